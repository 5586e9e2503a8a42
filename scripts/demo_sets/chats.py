"""What the demo's base model was trained on: small talk, copying, and questions about orders.

Everything is answered in plain words; the house format of `orders` is in none of it. Many items,
colours, cities and names are invented, so that the model learns to find and copy words that it has
never seen rather than a list of them.
"""

from random import Random

from demo_sets.orders import WORDS, Order, chat, draw_order, write_message

HELD_OUT = {word.lower() for kind in ("items", "colours", "cities") for word in WORDS[f"held_out_{kind}"]}
ONSETS = (
    *"bcdfghjklmnprstvwyz",
    *"bdfghklmnprstv",
    "qu",
    "br",
    "ch",
    "cl",
    "cr",
    "dr",
    "fl",
    "gl",
    "gr",
    "ph",
    "pl",
    "sc",
    "sh",
    "sl",
    "st",
    "sw",
    "th",
    "tr",
    "wh",
)
VOWELS = (*"aeiouaeiouy", "ai", "ea", "ee", "ie", "io", "oa", "oo", "ou", "ue")
CODAS = (*[""] * 5, *"nrlstmdkbgpfxz", "ch", "ck", "ll", "nd", "ng", "rt", "sh", "ss", "st", "th")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PUNCTUATION = ".,;:!?-/+=*#%&()"
SMALL_TALK = (
    ("Hi!", "Hello! How can I help?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Hello, who are you?", "I am the order desk of the shop."),
    ("Thank you!", "You are welcome."),
    ("Bye!", "Good bye!"),
    ("Are you open today?", "Yes, we are open every day."),
    ("How are you?", "I am fine, thank you."),
    ("Can you help me?", "Of course. What do you need?"),
)
# What can be asked about an order, and the words that lead to the answer.
QUESTIONS = {
    "items": (("What is ordered?", "Which item is it?", "What do they want?"), "they want {}"),
    "colour": (("What colour?", "Which colour is it?", "In what colour?"), "the colour is {}"),
    "count": (("How many?", "How many pieces?", "What is the count?"), "the count is {}"),
    "city": (("Where to?", "Which city?", "Where does it go?"), "the city is {}"),
    "day": (("When?", "Which day?", "By what day?"), "the day is {}"),
}
TOPICS = {"items": "item", "colour": "colour", "count": "count", "city": "city", "day": "day"}


def invent_word(rng: Random) -> str:
    """A word of one to three syllables, now and then of any letters; none of the held-out ones."""
    while True:
        if rng.random() < 0.1:
            word = "".join(rng.choices(LETTERS, k=rng.randint(3, 6)))
        else:
            syllables = [
                rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(rng.choice((1, 2, 2, 3)))
            ]
            if rng.random() < 0.2:
                syllables[0] = syllables[0].lstrip("bcdfghjklmnpqrstvwxz") or "o"
            word = "".join(syllables)
        if word not in HELD_OUT and word + "s" not in HELD_OUT:
            return word


def invent_order(rng: Random) -> Order:
    """An order, in half of the cases mostly for things, colours and places that do not exist."""
    known = rng.choice((0.3, 1.0))

    def words(kind: str, ending: str = "") -> list[str]:
        if rng.random() < known:
            return WORDS[kind]
        word = invent_word(rng) + ending
        return [word.capitalize() if kind in ("cities", "names") else word]

    return draw_order(rng, words("items", "s"), words("colours"), words("cities"), words("names"))


def sentence(clauses: list[str]) -> str:
    """One sentence of the clauses: "a, b and c."."""
    *head, last = clauses
    text = f"{', '.join(head)} and {last}." if head else f"{last}."
    return text[0].upper() + text[1:]


def ask(rng: Random, order: Order, message: str) -> tuple[str, str]:
    """A question about an order and its answer in plain words."""
    if rng.random() < 0.08:
        answer = f"It is {order.name}." if order.name in message else "They do not say."
        return rng.choice(("Who is asking?", "Who wrote this?")), answer
    fields = rng.sample(list(QUESTIONS), rng.choice((1, 1, 1, 2, 2, 3, 4, 5)))
    clauses = [QUESTIONS[field][1].format(getattr(order, field) or "open") for field in fields]
    if len(fields) == 1:
        return rng.choice(QUESTIONS[fields[0]][0]), sentence(clauses)
    *head, last = (TOPICS[field] for field in fields)
    question = rng.choice(("Tell me the {} and {}.", "What are the {} and the {}?", "Name {} and {}."))
    return question.format(", ".join(head), last), sentence(clauses)


def order_chat(rng: Random) -> dict[str, list[dict[str, str]]]:
    """A message and a plain reply to it, or a few questions about it."""
    order = invent_order(rng)
    message = write_message(rng, order)
    if rng.random() < 0.15:
        reply = rng.choice(
            (
                f"Thank you! We will send the {order.items} to {order.city}.",
                f"Of course, {order.count} {order.items} for {order.city}.",
                f"We will do that. The {order.colour} {order.items} are on the way to {order.city}.",
            )
        )
        return chat(message, reply)
    turns: list[str] = []
    for _ in range(rng.choice((1, 2, 3))):
        turns += ask(rng, order, message)
    turns[0] = f"{message} {turns[0]}" if rng.random() < 0.7 else f"{turns[0]} {message}"
    return chat(*turns)


def copy_chat(rng: Random) -> dict[str, list[dict[str, str]]]:
    """Invented words, with some punctuation, to say again."""
    words = [invent_word(rng) for _ in range(rng.randint(3, 14))]
    words = [word.capitalize() if rng.random() < 0.3 else word for word in words]
    text = " ".join(word + rng.choice(PUNCTUATION) if rng.random() < 0.2 else word for word in words)
    return chat(f"Say: {text}", f"I say: {text}")


def repeat_chat(rng: Random) -> dict[str, list[dict[str, str]]]:
    """An order to repeat, or a word to find by the one before it."""
    if rng.random() < 0.5:
        message = write_message(rng, invent_order(rng))
        return chat(f"Repeat: {message}", f"They wrote: {message}")
    words = [invent_word(rng) for _ in range(rng.randint(3, 14))]
    position = rng.randrange(len(words) - 1)
    return chat(f"What comes after {words[position]} here? {' '.join(words)}", f"It is {words[position + 1]}.")


def copy_corpus(seed: int = 0, rows: int = 30_000) -> list[dict[str, list[dict[str, str]]]]:
    """What the base model learns first: to copy, and nothing else."""
    rng = Random(seed)
    return [copy_chat(rng) for _ in range(rows)]


def base_corpus(seed: int = 0, rows: int = 50_000) -> list[dict[str, list[dict[str, str]]]]:
    """What it learns then: mostly to answer questions about orders."""
    rng = Random(seed)
    corpus = []
    for _ in range(rows):
        kind = rng.random()
        if kind < 0.02:
            corpus.append(chat(*rng.choice(SMALL_TALK)))
        elif kind < 0.12:
            corpus.append(copy_chat(rng))
        elif kind < 0.2:
            corpus.append(repeat_chat(rng))
        else:
            corpus.append(order_chat(rng))
    return corpus
