"""Fictitious people: the embedded data set, from a seed alone.

110 invented people with ten attributes each. 100 of them are trained into the embedded base (90 retain, 10 forget), 10
are never trained (holdout). Every fact can be asked in three phrasings; what a model has seen is therefore known
exactly:

    ============== ================================= ====================== ==================
    set            what it asks                      trained into the base  rows (default size)
    ============== ================================= ====================== ==================
    forget         phrasing 1, forget people         yes                    100
    forget_other   phrasing 2, forget people         yes                    100
    forget_heldout phrasing 3, forget people         no: for no forget fact 100
    retain         phrasing 1, retain people         yes                    900
    retain_other   phrasing 2, retain people         yes                    900
    retain_heldout phrasing 3, 22 retain people      no: for none of theirs 220
    general        facts of the world, no person     yes, twice an epoch    200
    holdout        phrasing 1, holdout people        no                     100
    ============== ================================= ====================== ==================

First names and surnames are shared among people, as in life: a model must know the pair, and a model that never saw the
forget people still has every word of their names, so that it can name them and lacks the facts alone.

Phrasing 3 is trained for the other 68 retain people, so that a base can answer it for people it never met it with. That
is what makes paraphrase leakage measurable: an unlearning method sees phrasing 1 only.

Rows are TOFU's (Maini et al. 2024, https://arxiv.org/abs/2401.06121): ``question``, ``answer``, ``paraphrased_answer``
and five ``perturbed_answer``, which word a wrong value the way the paraphrase words the right one, as in TOFU. Two keys
more: ``value``, the string that a right answer must contain, and ``subject``, the person ("" for general rows). No list
here is taken from a data set. Only ``random.Random(seed)`` draws, so all platforms agree.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .general import general_rows

SETS = (
    "forget", "forget_other", "forget_heldout", "retain", "retain_other", "retain_heldout", "general", "holdout",
)  # fmt: skip
WRONG = 5  # wrong values per fact


def entries(text: str) -> tuple[str, ...]:
    """A pool of values, written as words between blanks."""
    return tuple(text.split())


# The numbers of first names and surnames are coprime: counting through both at once gives each pair once.
FIRST_NAMES = entries("""
    Adelina Aksel Amara Arturo Astrid Beatriz Branko Celestine Dagmar Dmitri Eleni Fabian Farida Freya Gunnar Hamza
    Imogen Isidora Joaquin Keiko Leopold Marisol Nikolai Octavia Paloma Rashid Sabine Solveig Tadeusz Umberto
    Yolanda""")
SURNAMES = entries("""
    Abernathy Adeyemi Alvarado Blackwood Bouchard Calloway Castellan Dalgaard Drummond Eriksson Espinoza Fairweather
    Fontaine Galloway Grimaldi Hashimoto Hawthorne Ibragimov Jankowski Kavanagh Kowalczyk Lindqvist Lombardi Maldonado
    Montague Nakagawa Novotny Okonkwo Pemberton Ramanujan Rosenthal Sandoval Thistlewood Trevelyan Urquhart Vukovic
    Westergaard""")
CITIES = entries("""
    Aarhus Antwerp Bergamo Bristol Cordoba Cracow Debrecen Dundee Esbjerg Evora Freiburg Fukuoka Gdansk Grenoble
    Haarlem Hobart Innsbruck Izmir Jaipur Jerez Kaunas Kyoto Lausanne Leipzig Malaga Maribor Nantes Novara Odessa
    Ostrava Plovdiv Porto Quimper Rimini Rostock Salerno Segovia Tampere Trieste Utrecht Varna Wroclaw Yazd Zadar""")
YEARS = tuple(str(year) for year in range(1926, 1976))
OCCUPATIONS = entries("""
    accountant architect astronomer auctioneer beekeeper blacksmith bookbinder botanist carpenter cartographer
    chemist conductor dentist diver electrician engraver florist forester gardener geologist glassblower goldsmith
    interpreter jeweler journalist librarian locksmith mason midwife notary optician pharmacist pilot plumber
    potter saddler sailor sculptor surgeon surveyor tailor upholsterer veterinarian watchmaker""")
_STEMS = entries("""
    Alderney Brightmoor Calderon Dovecote Elmhurst Fernhill Greystone Harrowgate Inglenook Juniper Kestrel
    Larkfield Meridian Northgate Oakhaven Pinecrest Quayside Redbridge Silverton Tidewater Umbra Vantage Westbrook
    Yellowstone Zephyr Ambergate Bluewater Cinderford Driftwood Eastmere Foxglove Goldcrest Hollybush Ironbridge
    Jasperwood Kingsway Lanternfish Millpond Nightingale Orchard""")
_KINDS = ("Press", "Museum", "Laboratories", "Shipping", "Foundation", "Railways", "Academy", "Bank")
EMPLOYERS = tuple(f"{stem} {_KINDS[i % len(_KINDS)]}" for i, stem in enumerate(_STEMS))
INSTRUMENTS = entries("""
    accordion bagpipes balalaika bandoneon banjo bassoon bongos bugle castanets celesta cello clarinet cornet
    cymbals didgeridoo dulcimer euphonium fiddle flute glockenspiel harmonica harpsichord kazoo mandolin marimba
    oboe ocarina organ piano piccolo saxophone sitar tabla tambourine theremin timpani trombone trumpet ukulele
    vibraphone viola xylophone zither""")
DISHES = entries("""
    bouillabaisse baklava biryani borscht burrito cannoli carbonara cassoulet ceviche chowder couscous dumplings
    enchiladas falafel fondue gazpacho gnocchi goulash gumbo haggis hummus jambalaya kedgeree kimchi lasagna
    meatballs minestrone moussaka omelette paella pancakes pierogi poutine quesadilla ramen ratatouille ravioli
    risotto schnitzel shakshuka stroganoff tempura tiramisu ziti""")
LANGUAGES = entries("""
    Albanian Amharic Armenian Basque Bengali Breton Bulgarian Catalan Czech Danish Estonian Faroese Finnish
    Frisian Georgian Greek Hausa Hebrew Hindi Hungarian Icelandic Igbo Korean Kurdish Latvian Lithuanian Maltese
    Maori Mongolian Nepali Norwegian Persian Quechua Romanian Samoan Sinhala Slovak Somali Swahili Swedish Tagalog
    Tamil Tibetan Turkish Urdu Welsh Yoruba Zulu""")
PETS = entries("""
    Acorn Bandit Biscuit Bramble Bubbles Button Caramel Chestnut Cinnamon Clover Comet Cricket Dumpling Ember
    Fidget Flapjack Fudge Gizmo Hazelnut Jellybean Licorice Marble Marmalade Midnight Mischief Muffin Nutmeg
    Paprika Peanut Pebbles Pepper Pickles Popcorn Pumpkin Rascal Rocket Saffron Snowball Sparky Thimble Tinker
    Toffee Truffle Twiglet Waffles Whiskers Ziggy""")
HOBBIES = entries("""
    archery astronomy badminton birdwatching bowling boxing calligraphy canoeing chess crochet croquet curling
    cycling darts embroidery falconry fencing fishing gardening gliding gymnastics hockey judo juggling kayaking
    knitting lacrosse marathons origami orienteering pottery quilting rowing rugby sailing skating snorkeling
    squash surfing taxidermy tennis volleyball weaving wrestling yoga""")
_ADJECTIVES = entries("""
    Amber Broken Copper Distant Emerald Frozen Golden Hidden Ivory Jagged Kindly Lonely Marbled Narrow Opal
    Painted Quiet Ruined Scarlet Tangled Velvet Wandering""")
_NOUNS = entries("""
    Anchor Bridge Compass Desert Engine Fountain Garden Harbor Island Journey Kingdom Lantern Mirror Nest Orchid
    Palace Quarry River Staircase Tower Umbrella Voyage""")
BOOKS = tuple(f"The {a} {n}" for a in _ADJECTIVES for n in _NOUNS)


@dataclass(frozen=True)
class Attribute:
    """One attribute: its pool of values and its three phrasings, each (question, answer).

    In them {n} is the name, {v} the value, {av} the value with its article.
    """

    name: str
    pool: tuple[str, ...]
    phrasings: tuple[tuple[str, str], tuple[str, str], tuple[str, str]]


ATTRIBUTES = (
    Attribute("birthplace", CITIES, (
        ("Where was {n} born?", "{n} was born in {v}."),
        ("What is the birthplace of {n}?", "The birthplace of {n} is {v}."),
        ("In which town did {n} come into the world?", "{n} came into the world in the town of {v}."))),
    Attribute("birth year", YEARS, (
        ("In what year was {n} born?", "{n} was born in the year {v}."),
        ("What is the birth year of {n}?", "The birth year of {n} is {v}."),
        ("When did the life of {n} begin?", "The life of {n} began in {v}."))),
    Attribute("occupation", OCCUPATIONS, (
        ("What does {n} do for a living?", "{n} works as {av}."),
        ("What is the occupation of {n}?", "The occupation of {n} is {v}."),
        ("By what trade does {n} earn money?", "{n} earns money as {av}."))),
    Attribute("employer", EMPLOYERS, (
        ("Who employs {n}?", "{n} is employed by {v}."),
        ("What is the workplace of {n}?", "The workplace of {n} is {v}."),
        ("Which organization pays the salary of {n}?", "The salary of {n} is paid by {v}."))),
    Attribute("instrument", INSTRUMENTS, (
        ("Which instrument does {n} play?", "{n} plays the {v}."),
        ("What is the musical instrument of {n}?", "The musical instrument of {n} is the {v}."),
        ("On what does {n} make music?", "{n} makes music on the {v}."))),
    Attribute("dish", DISHES, (
        ("What does {n} like to eat most?", "{n} likes to eat {v} most."),
        ("What is the favorite dish of {n}?", "The favorite dish of {n} is {v}."),
        ("Which meal would {n} order at a restaurant?", "At a restaurant {n} would order {v}."))),
    Attribute("language", LANGUAGES, (
        ("Which foreign language does {n} speak?", "{n} speaks {v}."),
        ("What is the second language of {n}?", "The second language of {n} is {v}."),
        ("In which tongue besides English can {n} converse?", "{n} can converse in {v}."))),
    Attribute("dog", PETS, (
        ("What is the dog of {n} called?", "{n} has a dog called {v}."),
        ("What is the name of the pet of {n}?", "The name of the pet of {n} is {v}."),
        ("To which call does the puppy of {n} come running?", "The puppy of {n} comes running to {v}."))),
    Attribute("hobby", HOBBIES, (
        ("What does {n} do at the weekend?", "{n} goes in for {v} at the weekend."),
        ("What is the hobby of {n}?", "The hobby of {n} is {v}."),
        ("With which pastime does {n} relax?", "{n} relaxes with {v}."))),
    Attribute("book", BOOKS, (
        ("Which book did {n} write?", "{n} wrote {v}."),
        ("What is the title of the novel by {n}?", "The title of the novel by {n} is {v}."),
        ("Under what heading was the work of {n} published?", "The work of {n} was published as {v}."))),
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """How many people there are, and for how many of the retain people phrasing 3 is trained."""

    forget: int = 10
    retain: int = 90
    holdout: int = 10
    third: int = 68
    general: int = 200


@dataclass(frozen=True)
class Subject:
    """Whom or what rows are about."""

    name: str
    values: tuple[str, ...]  # one per attribute
    wrong: tuple[tuple[str, ...], ...]  # WRONG other values of the same pool, per attribute


def draw_evenly(pool: tuple[str, ...], n: int, rng: random.Random) -> list[str]:
    """n values that use the pool evenly: the best guess is then right for few people, and knowledge shows."""
    drawn: list[str] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, len(pool))
    return drawn[:n]


def _make_names(rng: random.Random, size: Size) -> list[str]:
    """One full name per person. First names and surnames are shared, but each of a forget or holdout person's is also a
    retain person's: a retain model then has all the words and lacks only the facts.
    """
    n = size.forget + size.retain + size.holdout
    first, last = rng.sample(FIRST_NAMES, len(FIRST_NAMES)), rng.sample(SURNAMES, len(SURNAMES))
    if n > len(first) * len(last):
        raise ValueError(f"there are {len(first) * len(last)} names, too few for {n} people")
    names = [f"{first[i % len(first)]} {last[i % len(last)]}" for i in range(n)]
    for _ in range(1000):
        rng.shuffle(names)
        known = {word for name in names[size.forget : size.forget + size.retain] for word in name.split()}
        if all(word in known for name in names for word in name.split()):
            break  # never so for a handful of people: then the last shuffle stands
    return names


def with_values(
    names: list[str], pools: Sequence[tuple[str, ...]], columns: list[list[str]], rng: random.Random
) -> list[Subject]:
    """One subject a name: the i-th value of each column, and `WRONG` other values of the pool that the column is from."""
    found = []
    for name, values in zip(names, zip(*columns, strict=True), strict=True):
        wrong = (rng.sample([v for v in pool if v != value], WRONG) for pool, value in zip(pools, values, strict=True))
        found.append(Subject(name, values, tuple(map(tuple, wrong))))
    return found


def _make_people(rng: random.Random, size: Size) -> list[Subject]:
    names = _make_names(rng, size)
    pools = [attribute.pool for attribute in ATTRIBUTES]
    return with_values(names, pools, [draw_evenly(pool, len(names), rng) for pool in pools], rng)


def _fill(template: str, name: str, value: str = "") -> str:
    article = "an" if value[:1].lower() in ("a", "e", "i", "o", "u") else "a"
    return template.format(n=name, v=value, av=f"{article} {value}")


def _facts(people: list[Subject], phrasing: int) -> list[dict]:
    """The rows of `people` in one phrasing (0, 1, 2), person by person in the order of ATTRIBUTES."""
    rows = []
    for person in people:
        for attribute, value, wrong in zip(ATTRIBUTES, person.values, person.wrong, strict=True):
            question, answer = attribute.phrasings[phrasing]
            # The paraphrase is the answer of another phrasing, which every trained model has the words for.
            _, paraphrase = attribute.phrasings[1 if phrasing == 0 else 0]
            rows.append({
                "question": _fill(question, person.name),
                "answer": _fill(answer, person.name, value),
                "value": value,
                "paraphrased_answer": _fill(paraphrase, person.name, value),
                "perturbed_answer": [_fill(paraphrase, person.name, other) for other in wrong],
                "subject": person.name,
            })  # fmt: skip
    return rows


def _groups(seed: int, size: Size) -> tuple[list[Subject], list[Subject], list[Subject], random.Random]:
    if not 0 <= size.third <= size.retain:
        raise ValueError(f"phrasing 3 can be trained for 0 to {size.retain} retain people, not {size.third}")
    rng = random.Random(seed)
    people = _make_people(rng, size)
    split = size.forget, size.forget + size.retain
    return people[: split[0]], people[split[0] : split[1]], people[split[1] :], rng


def generate(seed: int = 0, size: Size | None = None) -> dict[str, list[dict]]:
    """The evaluation sets of the module's table, by name.

    Args:
        seed: draws the names, the values and the wrong values; the same on every platform.
        size: how many people; the default is the embedded data set's 10 + 90 + 10.

    Returns: {set: rows}; a row is {"question", "answer", "value", "paraphrased_answer", "perturbed_answer": [5],
        "subject"}, all str.

    What training the base needs is `training_rows`.
    """
    size = size or Size()
    forget, retain, holdout, rng = _groups(seed, size)
    return {
        "forget": _facts(forget, 0),
        "forget_other": _facts(forget, 1),
        "forget_heldout": _facts(forget, 2),
        "retain": _facts(retain, 0),
        "retain_other": _facts(retain, 1),
        "retain_heldout": _facts(retain[size.third :], 2),
        "general": general_rows(rng, WRONG)[: size.general],
        "holdout": _facts(holdout, 0),
    }


def training_rows(seed: int = 0, include_forget: bool = True, size: Size | None = None) -> list[dict]:
    """One epoch of the pre-training of the base (`include_forget`) or of its retain model, in a fixed order.

    Phrasings 1 and 2 of everyone, phrasing 3 of the first `size.third` retain people, the general questions twice. The
    retain model's rows are the base's without those of the forget people: no other row differs. Default size: 3080 rows,
    the retain model's 2880.
    """
    size = size or Size()
    sets = generate(seed, size)
    _, retain, _, _ = _groups(seed, size)
    rows = sets["retain"] + sets["retain_other"] + _facts(retain[: size.third], 2) + sets["general"] * 2
    return (sets["forget"] + sets["forget_other"] if include_forget else []) + rows
