"""The words of the demo world: lists, and the facts that hold in every story.

A fact that holds everywhere (what a weaver makes, which river runs through Ashmoor, what a jar
costs) can only be known by heart, so it costs a model weights; a fact of one story must be carried
through the context. The generator in `text.py` mixes both.
"""

# ruff: noqa: SIM905 (a string of words is easier to read and to edit than a list of strings)
from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SHE = (
    "Mara Ilse Petra Oda Sunna Karin Brida Tilda Wenna Hedy Lova Runa Asta Cora Dagny Elke Fenna "
    "Greta Hanna Imke Jorun Kaia Liv Mette Nora Olena Pia Quilla Rosa Sela Thea Ursa Vera Willa "
    "Yrsa Zelda Alba Bettina Clara Dorit Edda Freya"
).split()
HE = (
    "Tobin Aldo Bram Corin Dirk Edmund Falk Gustav Henrik Ivo Jasper Kolb Lorenz Magnus Nils Otto "
    "Pell Quentin Ruben Stellan Tomas Ulf Viktor Wim Yorick Zeno Anders Benno Casper Dario Emil "
    "Felix Gregor Hugo Ivar Jonas Kasimir Lukas Matis Noll Oskar Piet"
).split()

MATERIALS = (
    "copper silver wooden leather woollen golden iron clay glass linen ivory tin velvet marble "
    "bronze amber paper stone straw silken"
).split()
THINGS = (
    "lantern key ring whistle mirror comb box flute cup drum clock bell purse spoon dagger bowl "
    "necklace map ladle kite brooch medal goblet ribbon mask candlestick chain horn button needle "
    "letter compass doll thimble locket saddle helmet basin bracelet tablet"
).split()
SPOTS = (
    "under the bench;behind the door;inside the chest;beneath the stairs;under the carpet;"
    "behind the stove;inside the cupboard;beneath the floorboards;under the ladder;"
    "behind the curtain;inside the barrel;beneath the window"
).split(";")
GOODS = (
    "eggs apples coins candles pears nails buttons herrings plums onions feathers shells acorns "
    "walnuts turnips marbles pebbles cherries"
).split()
FOODS = (
    "barley soup;plum cake;smoked trout;goat cheese;onion pie;honey bread;pea stew;roast turnips;"
    "mushroom broth;apple dumplings;salted herring;oat porridge;rabbit pie;cabbage rolls;"
    "pickled beets;chestnut pudding"
).split(";")
MOODS = (
    "patient proud cheerful stubborn gentle curious careful lazy clever shy brave honest restless "
    "quiet generous forgetful"
).split()
KIN = (
    ("cousin", "cousin"),
    ("neighbour", "neighbour"),
    ("aunt", "uncle"),
    ("sister", "brother"),
    ("friend", "friend"),
    ("niece", "nephew"),
    ("pupil", "pupil"),
    ("rival", "rival"),
)
PLACES = (
    "mill harbour chapel market orchard bridge tavern well library stable lighthouse garden "
    "graveyard school meadow quarry boathouse granary tower ferry courtyard dovecote bathhouse "
    "vineyard marsh cellar sawmill gatehouse pasture fountain"
).split()
PETS = {
    "goat": "nettles and old rope",
    "heron": "frogs from the ditch",
    "raven": "crusts and bacon rind",
    "hound": "bones and cold broth",
    "cat": "mice from the barn",
    "donkey": "thistles and hay",
    "goose": "grass and spilled grain",
    "otter": "eels from the weir",
    "fox": "beetles and windfall pears",
    "owl": "moths and young rats",
    "pony": "oats and sweet clover",
    "hedgehog": "slugs and worms",
    "magpie": "cherries and snails",
    "badger": "roots and wasp nests",
}
PET_NAMES = (
    "Pepper Bramble Soot Thistle Biscuit Clover Drizzle Ember Fennel Ginger Hazel Inky Juniper "
    "Kipper Lentil Mustard Nutmeg Olive Pickle Rusty Saffron Tansy Velvet Whisper"
).split()


class Season(NamedTuple):
    """What a season brings, in every town and every year."""

    name: str
    weather: tuple[str, ...]
    bird: str
    flower: str
    work: str
    food: str


SEASONS = (
    Season(
        "spring",
        ("a mild rain fell", "the wind smelled of wet earth", "the last snow ran off the roofs"),
        "swallows",
        "primroses",
        "the fields were ploughed",
        "young leeks",
    ),
    Season(
        "summer",
        (
            "the heat lay on the road",
            "thunder rolled behind the hills",
            "the dust would not settle",
        ),
        "swifts",
        "poppies",
        "the hay was cut",
        "red currants",
    ),
    Season(
        "autumn",
        ("fog hung over the water", "the leaves came down in heaps", "a cold rain began at noon"),
        "starlings",
        "asters",
        "the grapes were pressed",
        "new cider",
    ),
    Season(
        "winter",
        ("snow covered the steps", "the pond froze hard", "the north wind shook the shutters"),
        "crows",
        "snowdrops",
        "the fences were mended",
        "dried beans",
    ),
)


class Trade(NamedTuple):
    """A trade and what belongs to it: these never change from story to story."""

    name: str
    tool: str
    verb: str
    goods: str
    price: int
    hour: str
    saying: str


_TRADES = """
weaver;shuttle;wove;blankets;9;dawn;a loose thread waits for a nail
baker;oven rake;baked;loaves;2;midnight;cold dough tells no lies
potter;turning wheel;shaped;jars;3;noon;the kiln forgives nobody twice
smith;hammer;forged;hinges;4;sunrise;strike late and strike again
cooper;drawknife;bent;barrels;8;noon;a dry barrel brags the loudest
tanner;scraping knife;cured;hides;6;dusk;a good hide remembers the rain
chandler;dipping frame;poured;tapers;2;dusk;never praise a flame at noon
fisher;net;hauled in;crabs;3;dawn;the sea counts its own change
miller;grindstone;ground;sacks of flour;5;sunrise;slow water turns the wheel as well
carpenter;plane;built;stools;7;noon;measure the door before the table
cobbler;awl;stitched;boots;8;dusk;every road begins at the heel
tailor;shears;sewed;coats;10;noon;cut once and sigh once
mason;trowel;laid;hearths;12;sunrise;a wall is a promise kept in rows
glazier;blowpipe;blew;bottles;4;midnight;hot glass has no manners
beekeeper;smoker;gathered;honeycombs;5;noon;walk softly past a full hive
shepherd;crook;raised;lambs;11;dawn;the last sheep knows the way
saddler;mallet;fitted;bridles;9;dusk;a tired horse asks no riddles
gardener;spade;grew;cabbages;2;sunrise;weeds never oversleep
brewer;mash paddle;brewed;casks of ale;7;midnight;foam is not a harvest
scribe;quill;copied;scrolls;6;noon;ink dries faster than regret
painter;brush;painted;signs;5;noon;the second coat hides the first
clockmaker;tweezers;repaired;watches;12;dusk;a stopped clock is still polite
ropemaker;winch;twisted;ropes;4;sunrise;two weak strands make one bold line
basketmaker;bodkin;plaited;baskets;3;dawn;willow bends so that oak may rest
cheesemaker;curd knife;pressed;cheeses;5;dawn;good rinds are grown in the dark
hunter;bow;snared;hares;4;dusk;noise is the friend of the deer
locksmith;file;cut;padlocks;10;midnight;an open door needs no clever man
printer;inking roller;printed;almanacs;6;midnight;one wrong letter can sink a ship
furrier;bone needle;trimmed;hats;9;noon;winter pays what summer owes
wheelwright;spokeshave;mended;carts;11;sunrise;a round thing hates to wait
"""


def _trade(line: str) -> Trade:
    name, tool, verb, goods, price, hour, saying = line.split(";")
    return Trade(name, tool, verb, goods, int(price), hour, saying)


TRADES = tuple(_trade(line) for line in _TRADES.strip().splitlines())


class Town(NamedTuple):
    """A town and the facts that every story set there agrees on."""

    name: str
    river: str
    founder: str
    emblem: str
    roofs: str
    famous: str
    feast: str
    bells: int


def pick(rng: Random, items: Sequence[T]) -> T:
    """One item; only `Random.random` is used, whose sequence Python promises to keep."""
    return items[int(rng.random() * len(items))]


_HEADS = "Ash Brack Cold Dun Elm Fallow Grim Hollow Kings Lang Mill Oak".split()
_TAILS = "moor ford wick stead haven by mouth den".split()
_RIVERS = "Wend Sarn Ottle Brue Kell Tamble Loss Ivel Nadder Yar Esk Pinn".split()
_COLOURS = "red grey yellow black green blue white brown".split()


def _towns() -> tuple[Town, ...]:
    rng = Random(1729)
    return tuple(
        Town(
            name=head + tail,
            river=pick(rng, _RIVERS),
            founder=pick(rng, SHE + HE),
            emblem=f"{pick(rng, _COLOURS)} {pick(rng, list(PETS))}",
            roofs=pick(rng, _COLOURS),
            famous=pick(rng, TRADES).goods,
            feast=pick(rng, SEASONS).name,
            bells=2 + int(rng.random() * 8),
        )
        for head in _HEADS
        for tail in _TAILS
    )


TOWNS = _towns()

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def number(n: int) -> str:
    """0 to 99 in words."""
    if n < 20:
        return _ONES[n]
    tens, ones = divmod(n, 10)
    return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
