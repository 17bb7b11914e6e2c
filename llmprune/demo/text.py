"""English-like stories, endless and seeded: what the demo model was trained on and is judged by.

Each story keeps a small world: who is where, who holds which object, what is hidden in which spot,
how many eggs somebody has left. Sentences are drawn from that world and change it, so that later
sentences can only be foreseen by someone who remembers the earlier ones. Facts from `words.py`
(trades, towns, seasons, animals) agree over all stories.

Splits differ in their seeds, so no story of one split occurs in another; they share the language
and the facts of `words.py`. Only `random.Random.random` is called, whose sequence for an integer
seed Python promises to keep, so that the text is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from llmprune.demo.words import (
    FOODS,
    GOODS,
    HE,
    KIN,
    MATERIALS,
    MOODS,
    PET_NAMES,
    PETS,
    PLACES,
    SEASONS,
    SHE,
    SPOTS,
    THINGS,
    TOWNS,
    TRADES,
    Trade,
    number,
    pick,
)

_T = TypeVar("_T")

SPLITS = ("train", "calibration", "test")


def documents(split: str, seed: int = 0) -> Iterator[str]:
    """Endless stories of one split ("train", "calibration" or "test"), each about 2,000 characters.

    Raises:
        ValueError: for an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    stream = seed * len(SPLITS) + SPLITS.index(split)
    return _stories(Random(stream))


def text(split: str, characters: int, seed: int = 0) -> str:
    """The first `characters` characters of a split, stories parted by an empty line."""
    parts: list[str] = []
    length = 0
    for story in documents(split, seed):
        if length >= characters:
            break
        parts.append(story + "\n\n")
        length += len(parts[-1])
    return "".join(parts)[:characters]


def _stories(rng: Random) -> Iterator[str]:
    while True:
        yield _Story(rng).tell()


@dataclass(eq=False)
class _Person:
    """Somebody; in a template `{p}` is the name and `{p:they}` the pronoun that agrees."""

    name: str
    woman: bool
    trade: Trade
    mood: str
    food: str
    place: str
    goods: str
    count: int
    pet: str = ""
    pet_name: str = ""

    def __format__(self, form: str) -> str:
        she, he = _PRONOUNS.get(form, (self.name, self.name))
        return she if self.woman else he

    def kin(self, pair: tuple[str, str]) -> str:
        return pair[0] if self.woman else pair[1]


_PRONOUNS = {
    "they": ("she", "he"),
    "them": ("her", "him"),
    "their": ("her", "his"),
    "theirs": ("hers", "his"),
    "themself": ("herself", "himself"),
}


@dataclass(eq=False)
class _Thing:
    """An object: with `holder`, or hidden at a `place` in a `spot`."""

    name: str  # "copper lantern"
    holder: _Person
    spot: str = ""  # "under the bench" while hidden, else ""
    place: str = ""

    def __format__(self, form: str) -> str:
        return f"{_article(self.name)} {self.name}" if form == "a" else f"the {self.name}"


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" or noun == "honest" else "a"


@dataclass(eq=False)
class _Story:
    rng: Random
    people: list[_Person] = field(default_factory=list)
    things: list[_Thing] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    focus: _Person | None = None  # of whom the last sentence spoke

    def __post_init__(self) -> None:
        rng = self.rng
        self.town = pick(rng, TOWNS)
        self.season = pick(rng, SEASONS)
        self.places = self.some(PLACES, 5)
        self.kin = pick(rng, KIN)
        women = [rng.random() < 0.5 for _ in range(3)]
        names = self.some(SHE, 3), self.some(HE, 3)
        trades = self.some(TRADES, 3)
        goods = self.some(GOODS, 3)
        for i, woman in enumerate(women):
            self.people.append(
                _Person(
                    name=names[not woman][i],
                    woman=woman,
                    trade=trades[i],
                    mood=pick(rng, MOODS),
                    food=pick(rng, FOODS),
                    place=self.places[i],
                    goods=goods[i],
                    count=self.between(5, 30),
                )
            )
        nouns, materials = self.some(THINGS, 2), self.some(MATERIALS, 2)
        holders = self.some(self.people, 2)
        for i in range(2):
            self.things.append(_Thing(f"{materials[i]} {nouns[i]}", holders[i]))
        keeper = pick(rng, self.people)
        keeper.pet, keeper.pet_name = pick(rng, list(PETS)), pick(rng, PET_NAMES)

    def some(self, items: Sequence[_T], n: int) -> list[_T]:
        """`n` different items, in drawn order."""
        left = list(items)
        return [left.pop(int(self.rng.random() * len(left))) for _ in range(n)]

    def between(self, low: int, high: int) -> int:
        """A whole number, both ends included."""
        return low + int(self.rng.random() * (high - low + 1))

    def say(self, *templates: str, p: _Person | None = None, **words: object) -> None:
        """One of `templates` filled in; a person just spoken of may become a pronoun."""
        sentence = pick(self.rng, templates)
        subject = sentence.startswith("{p} ") and not sentence.startswith("{p} the ")
        if subject and p is self.focus and self.rng.random() < 0.7:
            sentence = "{p:they}" + sentence.removeprefix("{p}")
        sentence = sentence.format(p=p, town=self.town, season=self.season, **words)
        self.sentences.append(sentence[0].upper() + sentence[1:])
        others = [w for w in words.values() if isinstance(w, _Person)]
        self.focus = None if others else p

    def tell(self) -> str:
        """The whole story: title, opening, events in paragraphs, and how it ended."""
        title = f"The {self.things[0].name.title()} of {self.town.name}"
        self.opening()
        paragraphs = [title, self.paragraph()]
        for _ in range(self.between(3, 4)):
            for _ in range(self.between(4, 5)):
                self.event()
            paragraphs.append(self.paragraph())
        self.ending()
        paragraphs.append(self.paragraph())
        return "\n".join(paragraphs)

    def paragraph(self) -> str:
        joined = " ".join(self.sentences)
        self.sentences.clear()
        self.focus = None
        return joined

    def opening(self) -> None:
        self.say(
            "It was {season.name} in {town.name}, and {weather}.",
            "One {season.name} in {town.name}, when {weather}, this is what happened.",
            "In {town.name} the {season.bird} had come with the {season.name}, and {weather}.",
            weather=pick(self.rng, self.season.weather),
        )
        self.about_town()
        for person in self.people:
            self.introduce(person)
        a, b, _ = self.people
        self.say(
            "{q} was {p:their} {kin}.",
            "{p} and {q} had known each other for years, for {q} was {p:their} {kin}.",
            p=a,
            q=b,
            kin=b.kin(self.kin),
        )
        for thing in self.things:
            self.say(
                "{p} owned {o:a}.",
                "{p} always carried {o:a}.",
                "The most precious thing that {p} had was {o:a}.",
                p=thing.holder,
                o=thing,
            )

    def introduce(self, p: _Person) -> None:
        self.say(
            "{p} was {a} {p.mood} {p.trade.name} who lived near {place}.",
            "There was {a} {p.mood} {p.trade.name} named {p}, "
            "and {p:their} house stood by {place}.",
            "Near {place} lived {p}, {a} {p.mood} {p.trade.name}.",
            p=p,
            a=_article(p.mood),
            place=f"the {p.place}",
        )
        self.focus = p
        self.say(
            "{p} had {n} {p.goods}.",
            "{p} kept {n} {p.goods} in a basket.",
            "In {p:their} basket lay {n} {p.goods}.",
            p=p,
            n=number(p.count),
        )
        if p.pet:
            self.say(
                "{p} had {a} {p.pet} called {p.pet_name}.",
                "{p:their} {p.pet} was called {p.pet_name}.",
                p=p,
                a=_article(p.pet),
            )

    def event(self) -> None:
        pick(self.rng, _EVENTS)(self)

    def about_town(self) -> None:
        self.say(
            "{town.name} lies on the river {town.river}.",
            "The river {town.river} runs through {town.name}.",
            "{town.name} was founded by {town.founder}.",
            "The banner of {town.name} shows a {town.emblem}.",
            "All the roofs in {town.name} are {town.roofs}.",
            "People know {town.name} for its {town.famous}.",
            "The great feast of {town.name} is held in {town.feast}.",
            "The tower of {town.name} has {bells} bells.",
            bells=number(self.town.bells),
        )

    def about_season(self) -> None:
        self.say(
            "The {season.bird} were loud that {season.name}.",
            "The {season.flower} stood along the road, as they do in {season.name}.",
            "It was the time of year when {season.work}.",
            "Everyone wanted {season.food}, for it was {season.name}.",
            "Outside, {weather}.",
            weather=pick(self.rng, self.season.weather),
        )

    def about_trade(self) -> None:
        p = pick(self.rng, self.people)
        made = self.between(2, 9)
        self.say(
            '"{saying}," said {p}, as every {p.trade.name} does.',
            "{p} {p.trade.verb} {n} {p.trade.goods} that day.",
            "{p} picked up {p:their} {p.trade.tool} and {p.trade.verb} {n} {p.trade.goods}.",
            "Like every {p.trade.name}, {p} was at work by {p.trade.hour}.",
            "{p} could not find {p:their} {p.trade.tool}, and a {p.trade.name} needs one.",
            p=p,
            n=number(made),
            saying=p.trade.saying[0].upper() + p.trade.saying[1:],
        )

    def about_pet(self) -> None:
        p = next(person for person in self.people if person.pet)
        self.say(
            "{p.pet_name} the {p.pet} was fed {feed}.",
            "{p} gave {p.pet_name} {feed}, which every {p.pet} likes.",
            "{p.pet_name} ran off, but {p} found the {p.pet} by the {place}.",
            '"Where is my {p.pet}?" asked {p}, and {p.pet_name} came running.',
            p=p,
            feed=PETS[p.pet],
            place=pick(self.rng, self.places),
        )

    def meal(self) -> None:
        p = pick(self.rng, self.people)
        self.say(
            "{p} ate {p.food}, which {p:they} liked above all.",
            "At {p.trade.hour} {p} sat down to {p.food}.",
            "There was {p.food} on the table, and {p} was glad of it.",
            p=p,
        )

    def move(self) -> None:
        p = pick(self.rng, self.people)
        old = p.place
        p.place = pick(self.rng, [place for place in self.places if place != old])
        self.say(
            "{p} went from the {old} to the {p.place}.",
            "{p} left the {old} and walked to the {p.place}.",
            "{p} had seen enough of the {old} and set out for the {p.place}.",
            "After a while {p} was tired of the {old}, so {p:they} went to the {p.place}.",
            p=p,
            old=old,
        )
        company = [q for q in self.people if q is not p and q.place == p.place]
        if company:
            self.say(
                "{q} was already there.",
                "There {p} met {q}, {a} {q.trade.name}.",
                "{p:they} found {q} waiting.",
                p=p,
                q=company[0],
                a=_article(company[0].trade.name),
            )

    def earn(self) -> None:
        p = pick(self.rng, self.people)
        n = self.between(2, 9)
        p.count = min(p.count, 90) + n  # number() ends at 99, and no story gets there
        self.say(
            "{p} found {n} more {p.goods}, and now {p:they} had {total}.",
            "Somebody brought {p} {n} {p.goods}, which made {total}.",
            "{p} had {old} {p.goods}, got {n} more, and so had {total}.",
            p=p,
            n=number(n),
            total=number(p.count),
            old=number(p.count - n),
        )

    def spend(self) -> None:
        p = pick(self.rng, self.people)
        n = min(self.between(2, 9), p.count - 2)
        if n < 2:
            return self.earn()
        p.count -= n
        self.say(
            "{p} lost {n} of the {old} {p.goods}, so {total} were left.",
            "{p} gave away {n} {p.goods} and kept {total}.",
            "Thieves took {n} of the {old} {p.goods} that {p} had, and {total} remained.",
            p=p,
            n=number(n),
            total=number(p.count),
            old=number(p.count + n),
        )

    def trade(self) -> None:
        buyer, seller = self.some(self.people, 2)
        n = self.between(2, 6)
        self.say(
            "{p} bought {n} {q.trade.goods} from {q} for {cost} crowns, at {price} crowns each.",
            "{q} sold {p} {n} {q.trade.goods} at {price} crowns each, {cost} in all.",
            p=buyer,
            q=seller,
            n=number(n),
            price=number(seller.trade.price),
            cost=number(n * seller.trade.price),
        )

    def give(self) -> None:
        thing = self.open_thing()
        if thing is None:
            return self.fetch()
        p = thing.holder
        q = pick(self.rng, [person for person in self.people if person is not p])
        if p.place != q.place:
            self.say(
                "{p} went to the {place}, where {q} was, and gave {q:them} {o}.",
                "{p} found {q} at the {place} and handed {q:them} {o}.",
                "{p} walked to the {place} because {q} was there, and let {q:them} have {o}.",
                p=p,
                q=q,
                o=thing,
                place=q.place,
            )
            p.place = q.place
        else:
            self.say(
                "{p} gave {o} to {q}, who stood beside {p:them} at the {p.place}.",
                "At the {p.place}, {p} handed {q} {o}.",
                p=p,
                q=q,
                o=thing,
            )
        thing.holder = q
        if self.rng.random() < 0.4:
            self.say(
                '"Thank you, {p}," said {q}.',
                "{q} thanked {p:them} and put {o} away.",
                "{q} was happy to have {o}, and {p} was not.",
                p=p,
                q=q,
                o=thing,
            )

    def open_thing(self) -> _Thing | None:
        free = [thing for thing in self.things if not thing.spot]
        return pick(self.rng, free) if free else None

    def hide(self) -> None:
        thing = self.open_thing()
        if thing is None:
            return self.fetch()
        p = thing.holder
        thing.spot, thing.place = pick(self.rng, SPOTS), p.place
        self.say(
            "{p} hid {o} {o.spot} at the {o.place}.",
            "When nobody looked, {p} put {o} {o.spot} at the {o.place}.",
            p=p,
            o=thing,
        )

    def fetch(self) -> None:
        hidden = [thing for thing in self.things if thing.spot]
        if not hidden:
            return self.hide()
        thing = pick(self.rng, hidden)
        p = pick(self.rng, self.people)
        if p.place != thing.place:
            self.say(
                "{p} went to the {place}.",
                "{p} hurried to the {place}.",
                p=p,
                place=thing.place,
            )
            p.place = thing.place
        self.say(
            "{p} looked {o.spot} at the {o.place} and took {o}.",
            "{p} searched the {o.place}, and there, {o.spot}, {p:they} found {o}.",
            p=p,
            o=thing,
        )
        thing.holder, thing.spot = p, ""

    def ask_place(self) -> None:
        q, p = self.some(self.people, 2)
        self.say(
            '"Where is {p}?" asked {q}. "At the {p.place}," was the answer.',
            "{q} wondered where {p} was; {p:they} was at the {p.place}.",
            "All this time {p} was at the {p.place}, and {q} at the {q.place}.",
            p=p,
            q=q,
        )

    def ask_thing(self) -> None:
        thing = pick(self.rng, self.things)
        q = pick(self.rng, [person for person in self.people if person is not thing.holder])
        if thing.spot:
            self.say(
                "{o} still lay {o.spot} at the {o.place}.",
                '"Who has {o}?" asked {q}. Nobody did; it was {o.spot} at the {o.place}.',
                q=q,
                o=thing,
            )
        else:
            self.say(
                '"Who has {o}?" asked {q}. "{p} has it," they told {q:them}.',
                "{q} would have liked to see {o}, but {p} had it at the {p.place}.",
                "{o} was still with {p}, the {p.trade.name}.",
                p=thing.holder,
                q=q,
                o=thing,
            )

    def ask_count(self) -> None:
        p = pick(self.rng, self.people)
        self.say(
            "{p} counted {p:their} {p.goods} once more: {n}.",
            '"How many {p.goods} do you have, {p}?" asked a child. "{N}," said the {p.trade.name}.',
            p=p,
            n=number(p.count),
            N=number(p.count).capitalize(),
        )

    def ending(self) -> None:
        self.say(
            "When evening came to {town.name}, all was settled.",
            "So the day ended by the river {town.river}.",
            "That night the {bells} bells of {town.name} rang.",
            bells=number(self.town.bells),
        )
        for p in self.people:
            self.say(
                "{p} the {p.trade.name} was at the {p.place} with {n} {p.goods}.",
                "{p}, {p.mood} as ever, stayed at the {p.place} and had {n} {p.goods}.",
                p=p,
                n=number(p.count),
            )
        for thing in self.things:
            if thing.spot:
                self.say("In the end {o} lay {o.spot} at the {o.place}.", o=thing)
            else:
                self.say("In the end {o} was with {p}.", p=thing.holder, o=thing)


_EVENTS = (
    _Story.about_town,
    _Story.about_season,
    _Story.about_trade,
    _Story.about_trade,
    _Story.about_pet,
    _Story.meal,
    _Story.move,
    _Story.move,
    _Story.earn,
    _Story.spend,
    _Story.trade,
    _Story.give,
    _Story.give,
    _Story.hide,
    _Story.fetch,
    _Story.ask_place,
    _Story.ask_thing,
    _Story.ask_thing,
    _Story.ask_count,
)
