"""Neutral prompts of many kinds: what a model is held to, by its own answers, while it forgets something else. Written for this project.

`KEEP` is trained on, `ASK` and `CODE` are for judging; none of one stands in the other.
"""

from __future__ import annotations

KEEP = tuple(
    """Explain in one sentence why the sky looks blue.
What is the boiling point of water at sea level?
Write a short greeting for a birthday card.
What is 17 plus 25?
Give me three tips for sleeping better.
Translate 'good morning' into Spanish.
What does a thermometer measure?
Write one sentence about autumn.
How do bees make honey?
What is the plural of 'mouse'?
Name two primary colors.
How many minutes are there in two hours?
What is photosynthesis?
Suggest a name for a small bakery.
Is a tomato a fruit or a vegetable?
What is the opposite of 'ancient'?
Describe the taste of a lemon.
How can I remove a coffee stain from a shirt?
Which planet is known for its rings?
What is a noun?
Write a polite email asking for a day off.
What is 9 times 6?
Why do we have leap years?
Give a synonym for 'happy'.
How do I boil an egg?
What is the largest ocean on Earth?
Summarize the story of the tortoise and the hare in one sentence.
What are clouds made of?
How do vaccines work?
Give me a riddle.
What is half of 90?
What do plants need to grow?
Who painted Starry Night?
What is gravity?
Correct the sentence: She don't like apples.
What is the speed of light, roughly?
List three animals that can fly.
How many continents are there?
Which instrument has 88 keys?
What is a budget?
How do I say 'thank you' in French?
What is the square root of 81?
Why is exercise healthy?
Write a two-line poem about the sea.
What is the main ingredient of bread?
What causes the tides?
Name a famous detective from fiction.
What does HTML stand for?
What is an algorithm?
How many legs does an ant have?
What is the freezing point of water in degrees Fahrenheit?
Give an example of a mammal that lives in the sea.
What is a synonym for 'quick'?
How do I tie a shoelace?
What is the difference between weather and climate?
What is 100 divided by 8?
Why do cats purr?
What is the chemical formula of water?
Write a slogan for a bicycle shop.
Who wrote Romeo and Juliet?
What is a leap of faith?
Which sense do we use our nose for?
Explain what a loan is.
What is the third month of the year?
How many strings does a violin have?
What is democracy?
Give me an idea for a cheap dinner.
How does a refrigerator keep food cold?
Write a Python function that adds two numbers.
Write a Python function that reverses a string.
Write a Python loop that prints the numbers from 1 to 10.
How do I open a file in Python?
What does the len function do in Python?
Write a SQL query that selects all rows of a table named users.
Write a JavaScript function that returns the larger of two numbers.
What is a variable in programming?
Write a Python list comprehension of the squares from 1 to 5.
What is recursion?
Write a Python class named Dog with a method bark.
How do I sort a list in Python?
What is the difference between a list and a tuple in Python?
Write a Python function that checks whether a number is even.
How do I write a comment in Python?
What is a hash table?
Write a regular expression that matches a four-digit number.
Write a Python function that counts the vowels of a word.
What is version control?
Write a bash command that lists all files of a folder.
What is an HTTP request?
Write a Python function that computes a factorial.""".splitlines()
)

# question -> accepted values
ASK: dict[str, tuple[str, ...]] = {
    "How many days are there in a week?": ("seven", "7"),
    "What is 7 times 8?": ("56",),
    "What color do you get from blue and yellow?": ("green",),
    "Which animal is called the king of the jungle?": ("lion",),
    "How many sides does a triangle have?": ("three", "3"),
    "What gas do humans need to breathe?": ("oxygen",),
    "What is the first month of the year?": ("January",),
    "Who wrote the play Macbeth?": ("Shakespeare",),
    "What is 15 minus 6?": ("9", "nine"),
    "Which planet do we live on?": ("Earth",),
    "What is frozen water called?": ("ice",),
    "How many hours are there in a day?": ("24", "twenty-four"),
    "What is the opposite of 'hot'?": ("cold",),
    "Which star is at the center of our solar system?": ("Sun",),
    "What do cows drink as calves?": ("milk",),
    "Which season comes after winter?": ("spring",),
    "What is the plural of 'child'?": ("children",),
    "What is 12 divided by 4?": ("3", "three"),
    "Which organ pumps blood through the body?": ("heart",),
    "What is the past tense of 'go'?": ("went",),
    "How many letters does the English alphabet have?": ("26", "twenty-six"),
    "What do we call a baby dog?": ("puppy", "pup"),
    "Which metal is attracted by a magnet: iron or wood?": ("iron",),
    "What is the largest planet of the solar system?": ("Jupiter",),
}

CODE = tuple(
    """Write a Python function that returns the largest element of a list.
Write a Python function that checks whether a string is a palindrome.
Write a Python function that computes the n-th Fibonacci number.
Write a Python function that removes duplicates from a list.
Write a Python function that converts Celsius to Fahrenheit.
Write a Python function that counts the words of a sentence.
Write a Python function that returns the sum of the digits of a number.
Write a Python function that merges two dictionaries.
Write a Python function that tells whether a number is prime.
Write a Python function that finds the average of a list of numbers.
Write a Python class named Counter with a method increment.
Write a Python function that reads a text file and returns its lines.""".splitlines()
)


def _named(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.replace("\n", ",").split(",") if name.strip())


# Things of one kind, for neighbors of a subject that is among them
KINDS: dict[str, tuple[str, ...]] = {
    "country": _named(
        """Argentina,Australia,Austria,Bangladesh,Belgium,Bolivia,Brazil,Bulgaria,Cambodia,Canada,Chile,China,Colombia,Croatia,Cuba,Denmark,Ecuador,Egypt,Estonia,Ethiopia,Finland,France,Germany,Ghana,Greece,Hungary,Iceland,India,Indonesia,Iran,Iraq,Ireland,Israel,
Italy,Jamaica,Japan,Jordan,Kenya,Latvia,Lebanon,Lithuania,Malaysia,Mali,Mexico,Mongolia,Morocco,Nepal,New Zealand,Nigeria,Norway,
Pakistan,Paraguay,Peru,Philippines,Poland,Portugal,Romania,Russia,Saudi Arabia,Senegal,Serbia,Slovakia,Slovenia,Somalia,South Korea,
Spain,Sudan,Sweden,Switzerland,Syria,Thailand,Tunisia,Turkey,Uganda,Ukraine,Uruguay,Venezuela,Vietnam,Zambia,Zimbabwe"""
    ),
    "element": _named(
        """aluminum,argon,arsenic,barium,beryllium,bismuth,boron,bromine,cadmium,calcium,carbon,cesium,chlorine,chromium,cobalt,copper,
fluorine,gallium,germanium,gold,helium,hydrogen,iodine,iridium,iron,krypton,lead,lithium,magnesium,manganese,mercury,molybdenum,neon,
nickel,nitrogen,osmium,oxygen,palladium,phosphorus,platinum,plutonium,potassium,radium,radon,rubidium,selenium,silicon,silver,sodium,
strontium,sulfur,tellurium,tin,titanium,tungsten,uranium,vanadium,xenon,yttrium,zinc,zirconium"""
    ),
    "state": _named(
        """Alabama,Alaska,Arizona,Arkansas,California,Colorado,Connecticut,Delaware,Florida,Georgia,Hawaii,Idaho,Illinois,Indiana,Iowa,
Kansas,Kentucky,Louisiana,Maine,Maryland,Massachusetts,Michigan,Minnesota,Mississippi,Missouri,Montana,Nebraska,Nevada,New Hampshire,
New Jersey,New Mexico,New York,North Carolina,North Dakota,Ohio,Oklahoma,Oregon,Pennsylvania,Rhode Island,South Carolina,South Dakota,
Tennessee,Texas,Utah,Vermont,Virginia,Washington,West Virginia,Wisconsin,Wyoming"""
    ),
    "planet": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"),
}  # fmt: skip
