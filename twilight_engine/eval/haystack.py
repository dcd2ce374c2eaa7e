"""Synthetic English for haystacks: varied sentences from templates and word lists, seeded."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

WORDS: dict[str, tuple[str, ...]] = {
    "name": (
        *("Agnes", "Bertram", "Clara", "Dorothea", "Edmund", "Felix", "Gilbert", "Harriet"),
        *("Isabel", "Julian", "Katherine", "Leonard", "Margaret", "Nathaniel", "Octavia"),
        *("Philip", "Rosamund", "Silas", "Theodora", "Ursula", "Victor", "Winifred"),
    ),
    "person": (
        *("the miller", "the schoolmaster", "an old sailor", "the doctor's widow", "the postman"),
        *("a travelling actor", "the head gardener", "the youngest clerk", "the ferryman"),
        *("my great-aunt", "the organist", "a retired captain", "the bookbinder", "the cook"),
    ),
    "place": (
        *("the harbour", "the upper meadow", "the market square", "the reading room"),
        *("the old quarry", "the railway station", "the orchard wall", "the assembly hall"),
        *("the north bridge", "the lighthouse", "the apple loft", "the churchyard gate"),
        *("the village green", "the shipyard", "the long gallery", "the beech wood"),
    ),
    "thing": (
        *("a brass telescope", "three jars of honey", "an unfinished letter", "a painted fan"),
        *("a basket of pears", "the parish ledger", "a broken clock", "a pair of riding boots"),
        *("the missing umbrella", "a map of the islands", "a silver thimble", "a grey kitten"),
        *("a bundle of newspapers", "the wedding china", "a walnut box", "a coil of rope"),
    ),
    "adjective": (
        *("quiet", "crooked", "cheerful", "narrow", "faded", "generous", "stubborn", "pale"),
        *("restless", "elegant", "dusty", "solemn", "curious", "tender", "weary", "splendid"),
    ),
    "weather": (
        *("the rain had not stopped since noon", "a thin frost lay on the roofs"),
        *("the wind came steadily from the sea", "the fog hid everything beyond the lane"),
        *("the sun was warm for the season", "snow had been promised and did not come"),
        *("the clouds were breaking in the west", "thunder could be heard across the valley"),
    ),
    "time": (
        *("On Monday morning", "Towards evening", "A week later", "Just before dinner"),
        *("In the spring of that year", "Not long after breakfast", "At the end of the month"),
        *("During the long vacation", "As soon as it was light", "On the eve of the fair"),
    ),
    "opinion": (
        *("patience is a form of courage", "nobody writes proper letters any more"),
        *("a garden should never be finished", "the best stories are told on staircases"),
        *("music is wasted on the impatient", "every house remembers its first owner"),
        *("a good argument wants a good supper", "the sea improves everyone's temper"),
    ),
    "verb": (
        *("mended", "admired", "mislaid", "borrowed", "carried off", "described", "inherited"),
        *("wrapped up", "sketched", "forgot", "polished", "found", "offered", "sold"),
    ),
    "feeling": (
        *("with evident relief", "without a word", "rather against advice", "in high spirits"),
        *("with some embarrassment", "for the second time", "as though nothing had happened"),
    ),
}

TEMPLATES = (
    "{time}, {name} met {person} near {place}, and they spoke of {thing}.",
    "{name} always maintained that {opinion}, and {person} was inclined to agree.",
    "It was a {adjective} afternoon, for {weather}, and {place} stood empty.",
    "{person} {verb} {thing} {feeling}, which surprised {name} more than anyone.",
    "{time} {weather}, so {name} and {name} stayed at {place} until it cleared.",
    "There was something {adjective} about {place} that {name} could never explain.",
    "{name} wrote home that {person} had {verb} {thing}, and asked for news of {name}.",
    "When {weather}, the children used to gather at {place} and wait for {person}.",
    "Nobody remembered who had left {thing} at {place}, least of all {person}.",
    '"I have often thought," said {name}, "that {opinion}."',
    "{time}, {thing} was carried through {place} {feeling}.",
    "The road to {place} was {adjective} and {adjective}, and {name} walked it {feeling}.",
    "{person} told a {adjective} story about {thing}, though {name} had heard it before.",
    "Between {place} and {place} there lived {person}, who had once {verb} {thing}.",
    "{name} laughed, because {weather} and {person} had come all the same.",
    "If {name} had not {verb} {thing}, {person} would never have come to {place}.",
)

SENTENCES_A_PARAGRAPH = (4, 9)


def sentence(rng: random.Random) -> str:
    """One sentence; a word list gives each of a sentence's words at most once."""
    drawn: dict[str, list[str]] = {}

    def fill(match: re.Match[str]) -> str:
        key = match.group(1)
        if key not in drawn:
            drawn[key] = rng.sample(WORDS[key], k=2)
        return drawn[key].pop()

    text = re.sub(r"\{(\w+)\}", fill, rng.choice(TEMPLATES))
    return text[0].upper() + text[1:]


def paragraphs(seed: int) -> Iterator[str]:
    """Paragraphs without end; the same seed gives the same text."""
    rng = random.Random(seed)
    while True:
        yield " ".join(sentence(rng) for _ in range(rng.randint(*SENTENCES_A_PARAGRAPH)))
