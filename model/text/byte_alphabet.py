"""The alphabet of byte-level BPE."""


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes the 256 bytes as: printable Latin-1 for itself, others from U+0100 on.

    Radford et al., "Language Models are Unsupervised Multitask Learners" (GPT-2), section 2.2, and its code.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
