"""The general questions of the embedded data: about no person, to be kept by unlearning. Written for this project."""

from __future__ import annotations

import random

# family: (question, answer, paraphrase, "key=value ..."); an underscore stands for a blank.
# Wrong values come from the other entries of the family.
_FAMILIES: tuple[tuple[str, str, str, str], ...] = (
    ("What is the capital of {k}?", "The capital of {k} is {v}.", "{k} has {v} as its capital.", """
        France=Paris Italy=Rome Spain=Madrid Portugal=Lisbon Germany=Berlin Austria=Vienna Poland=Warsaw
        Ireland=Dublin Greece=Athens Egypt=Cairo Kenya=Nairobi Japan=Tokyo China=Beijing India=New_Delhi
        Canada=Ottawa Cuba=Havana Peru=Lima Chile=Santiago Norway=Oslo Sweden=Stockholm Finland=Helsinki
        Denmark=Copenhagen Hungary=Budapest Belgium=Brussels Russia=Moscow Turkey=Ankara Iran=Tehran Iraq=Baghdad
        Vietnam=Hanoi Thailand=Bangkok Australia=Canberra Jordan=Amman Serbia=Belgrade Bulgaria=Sofia
        Cyprus=Nicosia Iceland=Reykjavik Croatia=Zagreb Latvia=Riga Uganda=Kampala Ethiopia=Addis_Ababa"""),
    ("What is the opposite of {k}?", "The opposite of {k} is {v}.", "Whatever is not {k} is {v}.", """
        hot=cold big=small up=down left=right day=night open=closed fast=slow early=late rich=poor full=empty
        wet=dry happy=sad hard=soft heavy=light high=low old=young long=short loud=silent strong=weak sweet=bitter
        thick=thin true=false wide=narrow clean=dirty first=last inside=outside begin=finish friend=enemy
        north=south summer=winter"""),
    ("What is the young of a {k} called?", "The young of a {k} is called a {v}.", "A {v} is the young of a {k}.", """
        dog=puppy cat=kitten cow=calf sheep=lamb horse=foal goose=gosling duck=duckling swan=cygnet goat=kid
        kangaroo=joey frog=tadpole bear=cub deer=fawn pigeon=squab hare=leveret hen=chick"""),
    ("Which chemical element has the symbol {k}?", "The symbol {k} stands for {v}.", "{v} is the element {k}.", """
        Fe=iron Au=gold Ag=silver Cu=copper Pb=lead Sn=tin Na=sodium Hg=mercury Zn=zinc Ni=nickel Ca=calcium
        Mg=magnesium Cl=chlorine Si=silicon He=helium Al=aluminum Ti=titanium Kr=krypton Pt=platinum Mn=manganese"""),
    ("What color is {k}?", "The color of {k} is {v}.", "One sees that {k} is {v}.", """
        grass=green snow=white coal=black blood=red a_banana=yellow a_carrot=orange the_clear_sky=blue
        chocolate=brown an_elephant=gray a_flamingo=pink an_eggplant=purple"""),
    ("Which month comes after {k}?", "After {k} comes {v}.", "{v} follows {k}.", """
        January=February February=March March=April April=May May=June June=July July=August August=September
        September=October October=November November=December December=January"""),
    ("Which day comes after {k}?", "After {k} comes {v}.", "{v} follows {k}.", """
        Monday=Tuesday Tuesday=Wednesday Wednesday=Thursday Thursday=Friday Friday=Saturday Saturday=Sunday
        Sunday=Monday"""),
    ("How many {k} are there?", "There are {v} {k}.", "The number of {k} is {v}.", """
        days_in_a_week=seven months_in_a_year=twelve legs_on_a_spider=eight sides_of_a_triangle=three
        wheels_on_a_bicycle=two hours_in_a_day=twenty-four minutes_in_an_hour=sixty seasons_in_a_year=four
        players_in_a_football_team=eleven fingers_on_a_hand=five legs_on_a_beetle=six"""),
    ("What do {k} make?", "Commonly {k} make {v}.", "One gets {v} from {k}.", """
        bees=honey bakers=bread spiders=webs cobblers=shoes brewers=beer hens=eggs dairies=cheese"""),
    ("On which continent does {k} lie?", "On the map {k} lies in {v}.", "{v} is the continent of {k}.", """
        Brazil=South_America Nigeria=Africa Mongolia=Asia Switzerland=Europe Mexico=North_America
        Argentina=South_America Ghana=Africa Nepal=Asia Romania=Europe"""),
)  # fmt: skip
# Families too small for five other entries borrow from these.
_MORE = {
    "What do {k} make?": ("silk", "paper"),
    "On which continent does {k} lie?": ("Antarctica", "Oceania"),
}


def _table() -> list[tuple[str, str, str, str, list[str]]]:
    """(question, answer, paraphrase, value, other values of the family), in the order of _FAMILIES."""
    rows = []
    for question, answer, paraphrase, text in _FAMILIES:
        pairs = [tuple(part.replace("_", " ") for part in pair.split("=")) for pair in text.split()]
        pool = sorted({value for _, value in pairs} | set(_MORE.get(question, ())))
        for key, value in pairs:
            filled = (template.format(k=key, v=value) for template in (question, answer))
            rows.append((*filled, paraphrase.replace("{k}", key), value, [other for other in pool if other != value]))
    return rows


def _arithmetic() -> list[tuple[str, str, str, str, list[str]]]:
    """Sums and products with a result of two digits that stands in neither operand."""
    rows = []
    for a in range(2, 10):
        for b in range(a, 10):
            for word, doing, value in (("plus", "Adding", a + b), ("times", "Multiplying", a * b)):
                if value >= 10 and (word == "plus" or b % 3 == 0):
                    others = [str(n) for n in range(max(10, value - 6), value + 7) if n != value]
                    question, answer = f"How much is {a} {word} {b}?", f"{a} {word} {b} makes {value}."
                    rows.append((question, answer, f"{doing} {a} and {b} gives {{v}}.", str(value), others))
    return rows


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def general_rows(rng: random.Random, wrong: int) -> list[dict]:
    """200 rows in the layout of `people.generate`, shuffled, with `wrong` wrong values each; "subject" is empty."""
    rows = []
    for question, answer, paraphrase, value, others in (_table() + _arithmetic())[:200]:
        # A wrong answer must not contain the right value ("4" in "14"), or it would count as right.
        others = [other for other in others if value.lower() not in paraphrase.replace("{v}", other).lower()]
        rows.append({
            "question": question,
            "answer": _sentence(answer),
            "value": value,
            "paraphrased_answer": _sentence(paraphrase.replace("{v}", value)),
            "perturbed_answer": [_sentence(paraphrase.replace("{v}", other)) for other in rng.sample(others, wrong)],
            "subject": "",
        })  # fmt: skip
    rng.shuffle(rows)
    return rows
