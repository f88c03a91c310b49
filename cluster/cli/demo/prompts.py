"""What the demo asks: real text of several lengths, written for it."""

from dataclasses import dataclass

ESSAY = """\
An isthmus is a narrow strip of land between two seas. To a map maker it is an obstacle, to a merchant it \
is an invitation. Two coasts that lie a morning's walk apart may be a month apart by ship, and whoever \
finds a good way across that walk changes the price of everything on both sides of it.

The oldest way across was to unload. A ship arrived on the western shore, its cargo was carried over the \
hills by porters and mules, and another ship on the eastern shore took it on. It was slow, and half of the \
skill lay in packing: a jar of oil that took the space of two was a jar that nobody wanted to carry. \
Traders learned to press, to dry, to fold and to stack. What crossed was smaller than what arrived, and \
nothing that mattered was lost.

The second way was to carry the ship itself. A paved road with grooves for the wheels of a cart led from \
shore to shore, and crews hauled whole hulls over it. It impressed visitors greatly. It also broke hulls, \
needed hundreds of hands at once, and stood still whenever one ship was stuck.

The third way was a canal, which every ruler planned and few finished. A canal costs more than both \
harbours together, and once it is dug it stays where it is. Small towns never had one. They had a road, \
some mules, and the habit of packing well, and with these they did more trade than their neighbours \
thought possible.

The lesson that the old harbour masters drew is short. Do not wait until the whole cargo lies on the quay: \
let the first mules leave while the ship is still being unloaded. Pack before you carry. Count what left \
and count what came, and when the two numbers differ, send it back. Whoever keeps to these rules needs no \
canal.
"""

_WINDS = ("west, fresh", "north, light", "south-east, strong", "calm", "west, a gale by night")
_GOODS = ("salt", "cedar planks", "oil in small jars", "dried figs", "copper", "wool", "paper")
_NOTES = (
    "One mule went lame at the second well and was relieved there.",
    "The count at the east gate agreed with ours.",
    "Two bales were short at the east gate; they were sent again the same evening.",
    "A captain complained of the wait, but his ship was empty before noon.",
    "The road was wet and the carts went in single file.",
)


def logbook(days: int, *, first: int = 1) -> str:
    """Entries of a harbour's log, one paragraph a day, about 48 tokens each."""
    entries = []
    for day in range(first, first + days):
        ships, loads = 2 + day * 7 % 5, 30 + day * 13 % 41
        goods, wind, note = _GOODS[day * 3 % 7], _WINDS[day * 2 % 5], _NOTES[day * 4 % 5]
        entries.append(
            f"Day {day}. Wind {wind}. {ships} ships on the western quay, {loads} loads of {goods} over the "
            f"road, the first of them gone before the last was ashore. {note}"
        )
    return "\n".join(entries)


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """One request of the demo."""

    title: str
    text: str
    chat: bool = True  # as a user's message, or else as a bare prompt
    max_tokens: int = 48


ONE_BY_ONE = (
    DemoRequest(title="short", chat=False, text="The sea lay calm on both sides of the narrow land, and"),
    DemoRequest(title="chat", text="Why is the sky blue? Answer in two sentences."),
    DemoRequest(title="essay", text=f"{ESSAY}\nWhat are the three ways across, in one sentence each?"),
    DemoRequest(title="logbook", text=f"{logbook(30)}\n\nWhat does this logbook record, in one sentence?"),
)

AT_ONCE = (
    DemoRequest(title="at once 1", text="Name three things that a lighthouse keeper needs.", max_tokens=64),
    DemoRequest(title="at once 2", text=f"{logbook(8, first=40)}\nWhich goods were carried?", max_tokens=64),
    DemoRequest(title="at once 3", text=f"{logbook(20, first=60)}\nWrite the next entry.", max_tokens=64),
)
