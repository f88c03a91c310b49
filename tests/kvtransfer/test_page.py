import pytest

from isthmus.kvtransfer.page import Section, packed_range, sections


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, (0, 0)), (64, (0, 0)), (191, (0, 0)), (192, (64, 128)), (255, (64, 128)), (700, (64, 576))],
)
def test_packs_all_but_the_first_page_the_last_full_one_and_the_rest(tokens, expected):
    assert packed_range(tokens, 64, packs=True) == expected


def test_packs_nothing_where_the_codec_does_not():
    assert packed_range(700, 64, packs=False) == (0, 0)


def test_cuts_runs_of_packed_pages_at_the_largest_section_and_raw_ones_at_every_page():
    assert sections(0, 700, 700, 64, packs=True, max_tokens=256) == [
        Section(0, 64, packed=False),
        Section(64, 256, packed=True),
        Section(320, 256, packed=True),
        Section(576, 64, packed=False),
        Section(640, 60, packed=False),
    ]


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 192, 193, 700, 1024])
@pytest.mark.parametrize("chunk", [64, 128, 512])
@pytest.mark.parametrize("packs", [True, False])
def test_chunks_cover_every_token_once_and_agree_with_the_whole(tokens, chunk, packs):
    covered = []
    for start in range(0, tokens, chunk):
        end = min(tokens, start + chunk)
        for section in sections(start, end, tokens, 64, packs=packs, max_tokens=128):
            assert section.packed == (section.start in range(*packed_range(tokens, 64, packs)))
            assert not section.packed or section.tokens % 64 == 0
            covered += range(section.start, section.end)
    assert covered == list(range(tokens))
