"""Story templates, lexicon and distractors of the `wordmath` task.

A template is declarative: ranges for the numbers the story states, the worked
steps as equations over them, and interchangeable wordings for each sentence.
Every stated number is at least 2, so that nouns after numbers are always
plural. Wordings of one sentence may be combined freely with those of the
others; a distractor is only ever put first or right before the question, so
pronouns never cross one.
"""

import dataclasses
import re

# Names, each with its pronouns (subject, capitalised subject).
SHE, HE = ("she", "She"), ("he", "He")
NAMES = tuple(
  (n, SHE) for n in ("Ann", "Cara", "Emma", "Gina", "Jane", "Lucy", "Mary", "Nora", "Rosa", "Zoe")
)
NAMES += tuple(
  (n, HE) for n in ("Adam", "Ben", "Carl", "Dan", "Finn", "Hugo", "Jack", "Leo", "Paul", "Tom")
)

# Nouns as (singular, plural). All start with a consonant sound: the wordings
# write "a" before a singular. The lists are disjoint, which keeps the "other"
# goods of a distractor different from what a problem is about.
GOODS = (
  ("marble", "marbles"),
  ("stamp", "stamps"),
  ("coin", "coins"),
  ("card", "cards"),
  ("sticker", "stickers"),
  ("shell", "shells"),
  ("bead", "beads"),
  ("balloon", "balloons"),
  ("pear", "pears"),
  ("plum", "plums"),
  ("toy", "toys"),
  ("nut", "nuts"),
)
SHOP = (
  ("pen", "pens"),
  ("hat", "hats"),
  ("ball", "balls"),
  ("cup", "cups"),
  ("kite", "kites"),
  ("lamp", "lamps"),
)
BAKED = (("cookie", "cookies"), ("muffin", "muffins"), ("pie", "pies"), ("roll", "rolls"))
PLANTS = (("rose", "roses"), ("tulip", "tulips"), ("bush", "bushes"), ("tree", "trees"))
VEHICLES = (("train", "trains"), ("bus", "buses"), ("boat", "boats"))
CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("basket", "baskets"), ("crate", "crates"))
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")

# Sentences whose number {z} is irrelevant. {D} appears nowhere else in a
# problem. The last one speaks of the protagonist, so it may only come after
# the story of a template that has one.
DISTRACTORS = (
  "{D} is {z} years old.",
  "{D} has {z} {other}.",
  "{D} wants to buy {z} {other}.",
  "It is {z} degrees outside.",
  "There are {z} birds in the park.",
  "The house of {D} has {z} windows.",
)
DISTRACTOR_ON_A = "{A} also has {z} {other}."

_STEP = re.compile(r"(\w)=(\w)([-+*/])(\w)")


@dataclasses.dataclass(frozen=True)
class Template:
  """One kind of problem.

  Attributes:
    items: nouns from which the {item}, {items} of the story are drawn.
    ranges: inclusive (low, high) for each number drawn, by its letter.
    equations: the worked steps in order, e.g. "s=a+b t=s*k"; the last result
      is the answer.
    slots: the story; for each sentence its interchangeable wordings. The last
      slot is the question.
  """

  items: tuple
  ranges: dict
  equations: str
  slots: tuple

  def __post_init__(self):
    matches = map(_STEP.fullmatch, self.equations.split())
    steps = tuple(m.groups() for m in matches)  # pyright: ignore[reportOptionalMemberAccess]  # constants match
    object.__setattr__(self, "steps", steps)
    text = " ".join(w for slot in self.slots for w in slot)
    object.__setattr__(self, "has_protagonist", "{A}" in text)


_HAS = (
  "{A} has {a} {items}.",
  "{A} has {a} {items} in a {box}.",
  "{A} owns {a} {items}.",
  "{A} keeps {a} {items} at home.",
)
_BOXES = (
  "{A} has {k} {boxes} with {n} {items} in each {box}.",
  "{A} fills {k} {boxes} with {n} {items} each.",
  "{A} owns {k} {boxes} and each {box} holds {n} {items}.",
)
_TOGETHER = (
  "How many {items} do {A} and {B} have together?",
  "How many {items} do {A} and {B} have in total?",
  "What is the total number of {items} that {A} and {B} have?",
)
_B_HAS = (
  "How many {items} does {B} have now?",
  "What is the number of {items} that {B} has now?",
  "Find the number of {items} that {B} has now.",
)
_A_HAS = (
  "How many {items} does {A} have now?",
  "How many {items} does {A} have in the end?",
  "Find the number of {items} that {A} has now.",
)
_MONEY_LEFT = (
  "How much money does {A} have left?",
  "How many dollars does {A} have left?",
  "Find the number of dollars that {A} still has.",
)

TEMPLATES = (
  # One person gains and loses.
  Template(
    GOODS,
    dict(a=(5, 99), b=(2, 60), c=(2, 80)),
    "s=a+b t=s-c",
    (
      _HAS,
      (
        "{B} gives {A} {b} more.",
        "{He} finds {b} more {items}.",
        "Then {he} buys {b} more {items} at a store.",
      ),
      (
        "After that {A} gives {c} {items} to {C}.",
        "After that {A} loses {c} {items}.",
        "Later {A} sells {c} {items}.",
      ),
      _A_HAS,
    ),
  ),
  # What is left, and a multiple of it.
  Template(
    GOODS,
    dict(a=(10, 99), b=(2, 80), k=(2, 9)),
    "s=a-b t=s*k",
    (
      (
        "{A} had {a} {items} but lost {b} of them.",
        "{A} had {a} {items} and gave {b} of them to {C}.",
        "{A} found {a} {items} and sold {b} of them.",
      ),
      (
        "{B} now has {k} times as many {items} as {A} has left.",
        "Now {B} has {k} times as many {items} as {A} still has.",
      ),
      _B_HAS,
    ),
  ),
  # Multiplicative comparison and total.
  Template(
    GOODS,
    dict(a=(3, 80), k=(2, 9)),
    "b=a*k t=a+b",
    (
      _HAS,
      (
        "{B} has {k} times as many {items} as {A}.",
        "{B} has {k} times as many {items} as {A} has.",
      ),
      _TOGETHER,
    ),
  ),
  # Chained comparison of three people.
  Template(
    GOODS,
    dict(a=(3, 50), k=(2, 6), c=(2, 60)),
    "b=a*k d=b-c e=a+b t=e+d",
    (
      _HAS,
      ("{B} has {k} times as many {items} as {A}.",),
      ("{C} has {c} fewer {items} than {B}.", "{B} has {c} more {items} than {C}."),
      (
        "How many {items} do {A}, {B} and {C} have together?",
        "How many {items} do {A}, {B} and {C} have in total?",
        "What is the total number of {items} that {A}, {B} and {C} have?",
      ),
    ),
  ),
  # Additive comparison and total.
  Template(
    GOODS,
    dict(a=(3, 99), m=(2, 80)),
    "b=a+m t=a+b",
    (
      _HAS,
      (
        "{B} has {m} more {items} than {A}.",
        "{A} has {m} fewer {items} than {B}.",
        "This is {m} fewer {items} than {B} has.",
      ),
      _TOGETHER,
    ),
  ),
  # Equal groups and loose items.
  Template(
    GOODS,
    dict(k=(2, 12), n=(3, 40), m=(2, 90)),
    "s=k*n t=s+m",
    (
      _BOXES,
      (
        "{He} finds {m} more {items}.",
        "{B} gives {A} {m} more {items}.",
        "Then {he} buys {m} more {items} at a store.",
      ),
      _A_HAS,
    ),
  ),
  # Equal groups, some given away, the rest shared.
  Template(
    GOODS,
    dict(k=(2, 9), n=(3, 30), m=(2, 60), j=(2, 9)),
    "s=k*n r=s-m t=r/j",
    (
      _BOXES,
      ("{He} gives {m} of these {items} to {B}.", "{He} sells {m} of these {items}."),
      (
        "{A} shares the rest equally among {j} friends.",
        "The rest is shared equally by {j} friends.",
      ),
      (
        "How many {items} does each friend get?",
        "Find the number of {items} that each friend gets.",
      ),
    ),
  ),
  # Pooled and shared.
  Template(
    GOODS,
    dict(a=(4, 90), b=(4, 90), k=(2, 9)),
    "s=a+b t=s/k",
    (
      (
        "{A} has {a} {items} and {B} has {b} {items}.",
        "{A} brings {a} {items} and {B} brings {b} {items}.",
      ),
      (
        "They share all of them equally among {k} children.",
        "They put all the {items} in a {box} and {k} children share them equally.",
      ),
      ("How many {items} does each child get?", "Find the number of {items} that each child gets."),
    ),
  ),
  # A purchase and the money left.
  Template(
    SHOP,
    dict(n=(2, 12), p=(2, 19), x=(20, 250)),
    "s=n*p t=x-s",
    (
      (
        "Each {item} costs {p} dollars.",
        "The price of a {item} is {p} dollars.",
        "A store sells {items} for {p} dollars each.",
      ),
      (
        "{A} has {x} dollars and buys {n} {items}.",
        "{A} takes {x} dollars to the store and buys {n} {items}.",
        "{A} starts with {x} dollars and buys {n} {items}.",
      ),
      _MONEY_LEFT,
    ),
  ),
  # Two kinds of goods.
  Template(
    SHOP,
    dict(n=(2, 9), p=(2, 25), m=(2, 9), q=(2, 25)),
    "s=n*p u=m*q t=s+u",
    (
      (
        "Each {item} costs {p} dollars and each {second} costs {q} dollars.",
        "A store sells {items} for {p} dollars each and {seconds} for {q} dollars each.",
      ),
      ("{A} buys {n} {items} and {m} {seconds}.", "{A} wants {n} {items} and {m} {seconds}."),
      (
        "How much money does {A} need to pay in total?",
        "How many dollars does {A} need to pay?",
        "Find the total price in dollars.",
      ),
    ),
  ),
  # Wages and spending.
  Template(
    SHOP,
    dict(w=(6, 60), d=(2, 9), x=(5, 200)),
    "s=w*d t=s-x",
    (
      (
        "{A} has no money at first and earns {w} dollars each day for {d} days.",
        "{A} starts with no money and works for {d} days for {w} dollars each day.",
      ),
      (
        "Then {he} spends {x} dollars on a new {item}.",
        "After that {he} pays {x} dollars for a {item}.",
      ),
      _MONEY_LEFT,
    ),
  ),
  # Reading at a rate: what remains.
  Template(
    SHOP,
    dict(x=(60, 400), p=(5, 40), d=(2, 9)),
    "s=p*d t=x-s",
    (
      (
        "A book has {x} pages.",
        "There are {x} pages in a book.",
        "{B} gives {A} a book with {x} pages.",
      ),
      (
        "{A} reads {p} pages of the book each day for {d} days.",
        "For {d} days {A} reads {p} pages of the book each day.",
      ),
      (
        "How many pages of the book are left?",
        "How many pages of the book does {A} still have to read?",
        "Find the number of pages that are left.",
      ),
    ),
  ),
  # Reading at a rate: how long it takes.
  Template(
    SHOP,
    dict(x=(40, 400), a=(10, 200), p=(4, 30)),
    "r=x-a t=r/p",
    (
      (
        "{A} has read {a} of the {x} pages of a book.",
        "A book has {x} pages and {A} has read {a} of them.",
      ),
      (
        "{He} now reads {p} pages of the book each day.",
        "From now on {he} reads {p} pages of it each day.",
      ),
      (
        "How many days does {A} need to finish the book?",
        "After how many more days is the book finished?",
        "Find the number of days {A} needs for the rest of the book.",
      ),
    ),
  ),
  # Two legs of a trip.
  Template(
    VEHICLES,
    dict(v=(12, 70), h=(2, 7), w=(12, 70), g=(2, 7)),
    "s=v*h u=w*g t=s+u",
    (
      (
        "A {item} goes {v} miles each hour for {h} hours.",
        "For {h} hours a {item} goes {v} miles each hour.",
      ),
      (
        "Then it goes {w} miles each hour for {g} hours.",
        "After that it goes {w} miles each hour for {g} more hours.",
      ),
      (
        "How many miles does the {item} go in total?",
        "Find the total number of miles the {item} goes.",
        "How far in miles does the {item} go?",
      ),
    ),
  ),
  # Rows, removals and additions.
  Template(
    PLANTS,
    dict(r=(3, 12), c=(4, 30), x=(2, 90), y=(2, 90)),
    "s=r*c u=s-x t=u+y",
    (
      (
        "A garden has {r} rows with {c} {items} in each row.",
        "{A} plants {r} rows of {c} {items} in a garden.",
        "There are {r} rows of {c} {items} in a garden.",
      ),
      ("Then {B} cuts down {x} of the {items}.", "Later {x} of the {items} are sold."),
      ("After that {y} new {items} are put in.", "{C} now plants {y} new {items} there."),
      (
        "How many {items} are there in the garden now?",
        "How many {items} does the garden have in the end?",
        "Find the number of {items} in the garden now.",
      ),
    ),
  ),
  # People get on and off.
  Template(
    VEHICLES,
    dict(a=(10, 150), b=(2, 60), c=(2, 60), e=(2, 60)),
    "s=a-b u=s+c t=u-e",
    (
      ("A {item} starts with {a} people.", "There are {a} people on a {item}."),
      (
        "At the first stop {b} people get off and {c} people get on.",
        "At the park {b} people get off and then {c} people get on.",
      ),
      ("At the next stop {e} people get off.", "Later {e} more people get off."),
      (
        "How many people are on the {item} now?",
        "How many people are on the {item} in the end?",
        "Find the number of people who are still on the {item}.",
      ),
    ),
  ),
  # Classes into teams.
  Template(
    SHOP,
    dict(k=(2, 9), n=(10, 35), g=(2, 60), j=(2, 9)),
    "s=k*n r=s-g t=r/j",
    (
      (
        "A school has {k} classes with {n} students in each class.",
        "There are {k} classes in a school and {n} students in each class.",
      ),
      ("On {day} {g} of the students stay at home.", "On {day} {g} students are not at school."),
      ("The rest form teams of {j} students.", "All the others play in teams of {j} students."),
      (
        "How many teams are there?",
        "How many teams are there on {day}?",
        "Find the number of teams.",
      ),
    ),
  ),
  # Half of an amount.
  Template(
    GOODS,
    dict(a=(6, 198), h=(2, 2), b=(3, 99)),
    "s=a/h t=s+b",
    (
      (
        "{A} has {a} {items} and gives half of them to {B}.",
        "{A} shares {a} {items} and {B} gets half of them.",
      ),
      (
        "{B} already had {b} {items}.",
        "At first {B} had {b} {items}.",
        "Then {B} finds {b} more {items}.",
      ),
      (
        "How many {items} does {B} have now?",
        "How many {items} does {B} have in the end?",
        "Find the number of {items} that {B} has now.",
      ),
    ),
  ),
  # Two rates compared.
  Template(
    BAKED,
    dict(p=(5, 60), d=(2, 9), q=(3, 50), e=(2, 9)),
    "s=p*d u=q*e t=s-u",
    (
      (
        "{A} makes {p} {items} each day for {d} days.",
        "For {d} days {A} makes {p} {items} each day.",
      ),
      (
        "{B} makes {q} {items} each day for {e} days.",
        "For {e} days {B} makes {q} {items} each day.",
      ),
      (
        "How many more {items} does {A} make than {B}?",
        "How many fewer {items} does {B} make than {A}?",
      ),
    ),
  ),
  # Packed and sold.
  Template(
    BAKED,
    dict(a=(8, 90), b=(8, 90), j=(2, 9), p=(2, 15)),
    "s=a+b u=s/j t=u*p",
    (
      (
        "A baker makes {a} {items} in the morning and {b} {items} later.",
        "{A} makes {a} {items} and {B} makes {b} {items}.",
      ),
      (
        "All the {items} are put in {boxes} of {j}.",
        "Each {box} is filled with {j} of these {items}.",
      ),
      ("Every {box} is sold for {p} dollars.", "The price of each {box} is {p} dollars."),
      (
        "How many dollars do all the {boxes} cost together?",
        "Find the total price in dollars of all the {boxes}.",
      ),
    ),
  ),
  # A tank that is emptied.
  Template(
    SHOP,
    dict(x=(60, 600), v=(4, 40), m=(3, 15)),
    "s=v*m t=x-s",
    (
      ("There are {x} liters of water in a tank.", "A full tank holds {x} liters of water."),
      (
        "Each minute {v} liters run out and this goes on for {m} minutes.",
        "For {m} minutes {v} liters run out each minute.",
      ),
      (
        "How many liters of water are left in the tank?",
        "How many liters are still in the tank?",
        "Find the number of liters that are left in the tank.",
      ),
    ),
  ),
  # The price of one, then of several.
  Template(
    SHOP,
    dict(n=(2, 9), x=(8, 180), m=(2, 12)),
    "u=x/n t=u*m",
    (
      (
        "{A} pays {x} dollars for {n} {items}.",
        "{A} buys {n} {items} for {x} dollars in total.",
        "The price of {n} {items} is {x} dollars.",
      ),
      (
        "{B} buys {m} {items} at the same price each.",
        "{B} wants to buy {m} {items} at the same price each.",
      ),
      (
        "How much money does {B} need to pay?",
        "How many dollars does {B} need to pay?",
        "Find the price in dollars that {B} pays.",
      ),
    ),
  ),
  # Ages.
  Template(
    SHOP,
    dict(a=(3, 20), b=(2, 15), k=(2, 3), y=(2, 30)),
    "s=a+b u=s*k t=u+y",
    (
      ("{A} is {a} years old.",),
      ("{B} is {b} years older than {A}.", "{A} is {b} years younger than {B}."),
      ("{C} is {k} times as old as {B}.",),
      ("How old will {C} be in {y} years?", "In {y} years, how old will {C} be?"),
    ),
  ),
  # Points over three games.
  Template(
    SHOP,
    dict(a=(3, 60), b=(3, 80), k=(2, 6)),
    "u=a*k s=a+b t=s+u",
    (
      (
        "{A} gets {a} points in the first game and {b} points in the next game.",
        "In the first game {A} gets {a} points and in the next game {b} points.",
      ),
      ("In the last game {he} gets {k} times as many points as in the first game.",),
      (
        "How many points does {A} get in total?",
        "What is the total number of points that {A} gets?",
        "Find the total number of points.",
      ),
    ),
  ),
  # Two days, then shared.
  Template(
    GOODS,
    dict(a=(4, 60), b=(2, 60), k=(2, 9)),
    "s=a+b u=a+s t=u/k",
    (
      (
        "{A} finds {a} {items} on {day} and {b} more than that on the next day.",
        "{A} buys {a} {items} on {day} and {b} more than that on the next day.",
      ),
      (
        "{He} puts all the {items} in {k} {boxes} with the same number in each.",
        "Then {he} shares all the {items} equally among {k} {boxes}.",
      ),
      ("How many {items} are there in each {box}?", "Find the number of {items} in each {box}."),
    ),
  ),
  # A store's stock over two days and a delivery.
  Template(
    GOODS,
    dict(a=(60, 300), b=(5, 99), c=(5, 99), k=(2, 9), n=(4, 30)),
    "s=a-b u=s-c w=k*n t=u+w",
    (
      ("A store has {a} {items}.", "There are {a} {items} in a store."),
      (
        "The store sells {b} of them in the morning and {c} more later.",
        "On {day} {b} of them are sold and on the next day {c} more.",
      ),
      (
        "Then {k} {boxes} with {n} {items} each are brought to the store.",
        "After that the store buys {k} {boxes} of {n} {items} each.",
      ),
      (
        "How many {items} does the store have now?",
        "How many {items} are there in the store in the end?",
        "Find the number of {items} in the store now.",
      ),
    ),
  ),
)
