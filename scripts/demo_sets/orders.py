"""Orders to a shop, and the demo's chat set: messages in plain English, answered with one record.

    python scripts/demo_sets/orders.py        # writes orders_train.jsonl and orders_eval.jsonl into phi3_jax/demo again

A row asks with a message such as "Hi, could you send 3 red mugs to Oslo by Friday?" and answers
`item: mugs; colour: red; count: 3; city: Oslo; day: Friday`. Everything is drawn from a seeded
generator. Held-out messages share no order with the training rows, and one in four uses a word that
occurs nowhere else: not in the training rows, nor in what the base model has seen.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random

import yaml

WORDS: dict[str, list[str]] = {
    name: words.split()
    for name, words in yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")).items()
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine", 12: "a dozen"}

GREETINGS = (
    "",
    "",
    "Hi, ",
    "Hello, ",
    "Good morning, ",
    "Hello again, ",
    "Dear shop, ",
    "Hi there, ",
    "Good evening, ",
)
REQUESTS = (
    "could you send {count} {colour} {items} to {city}[ by {day}]?",
    "please send {count} {colour} {items} to our office in {city}[, {day} at the latest].",
    "we need {count} {colour} {items} in {city}[ on {day}].",
    "please ship {count} {items} in {colour} to {city}[ by {day}].",
    "I would like to order {items}: {count} pieces, {colour}, for {city}[, by {day}].",
    "my sister in {city} should get {count} {colour} {items}[ on {day}].",
    "can I have {count} {items} delivered to {city}[ by {day}]? The {colour} ones, please.",
    "an order for {city}: {count} {colour} {items}[, needed on {day}].",
    "do you still have {colour} {items}? I want {count} of them sent to {city}[ before {day}].",
    "our shop in {city} is out of {items}. Please bring {count} {colour} ones[ on {day}].",
    "I am looking for {items}, {count} of them, all {colour}. Ship them to {city}[ by {day}].",
    "send the {colour} {items} to {city}, {count} in all[, not later than {day}].",
    "[it has to be there on {day}: ]{count} {colour} {items} for my customer in {city}.",
    "we are moving to {city} and want {count} {items}. Make them {colour}[ and be there by {day}].",
    "put me down for {count} {colour} {items}[ for {day}], going to {city}.",
    "people in {city} are waiting for {items} in {colour}. They asked for {count}[ by {day}].",
)
CLOSINGS = ("", "", "", " Thanks!", " Thank you, {name}", " Best wishes, {name}", " {name} here.", " Yours, {name}")


@dataclass(frozen=True)
class Order:
    """What a message asks for; `day` is None where it names none, `name` is the writer's."""

    items: str
    colour: str
    count: int
    city: str
    day: str | None
    name: str


def draw_order(rng: Random, items: list[str], colours: list[str], cities: list[str], names: list[str]) -> Order:
    """An order with its words drawn from the lists; one in five names no day."""
    return Order(
        items=rng.choice(items),
        colour=rng.choice(colours),
        count=rng.choice((rng.randint(2, 12), rng.randint(2, 99))),
        city=rng.choice(cities),
        day=rng.choice(WORDS["days"]) if rng.random() < 0.8 else None,
        name=rng.choice(names),
    )


def write_message(rng: Random, order: Order) -> str:
    """A message that places the order, in one of some thousand ways."""
    head, optional, tail = rng.choice(REQUESTS).replace("]", "[").split("[")
    request = head + (optional if order.day else "") + tail
    text = rng.choice(GREETINGS) + request + rng.choice(CLOSINGS)
    count = str(order.count)
    if order.count in NUMBER_WORDS and rng.random() < 0.5:
        count = NUMBER_WORDS[order.count]
    text = text.format(
        count=count, colour=order.colour, items=order.items, city=order.city, day=order.day, name=order.name
    )
    return text[0].upper() + text[1:]


def write_record(order: Order) -> str:
    """The house format, which the base model has never seen."""
    return (
        f"item: {order.items}; colour: {order.colour}; count: {order.count}; city: {order.city}; "
        f"day: {order.day or 'open'}"
    )


def chat(*turns: str) -> dict[str, list[dict[str, str]]]:
    """A row of alternating user and assistant turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def chat_set(
    seed: int = 0, train: int = 2000, held_out: int = 200
) -> tuple[list[dict[str, list[dict[str, str]]]], list[dict[str, list[dict[str, str]]]]]:
    """The demo's training and held-out rows; no order of one is in the other.

    In every fourth held-out row the item, the colour or the city is a held-out word.
    """
    rng = Random(seed)
    # Many colours: with few, the adapter learns them by heart and stumbles over another.
    known = {
        "items": WORDS["items"],
        "colours": WORDS["colours"] + WORDS["shop_colours"],
        "cities": WORDS["cities"],
    }
    taken: set[str] = set()

    def row(unseen: str | None) -> dict[str, list[dict[str, str]]]:
        items, colours, cities = (WORDS[f"held_out_{kind}"] if kind == unseen else known[kind] for kind in known)
        while True:
            order = draw_order(rng, items, colours, cities, WORDS["names"])
            record = write_record(order)
            if record not in taken:
                taken.add(record)
                return chat(write_message(rng, order), record)

    train_rows = [row(None) for _ in range(train)]
    unseen = (None, None, None, "items", None, None, None, "colours", None, None, None, "cities")
    return train_rows, [row(unseen[i % len(unseen)]) for i in range(held_out)]


def write_rows(path: Path, rows: list[dict[str, list[dict[str, str]]]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(__file__).parents[2] / "phi3_jax" / "demo"
    train, held_out = chat_set()
    write_rows(folder / "orders_train.jsonl", train)
    write_rows(folder / "orders_eval.jsonl", held_out)
    print(f"{len(train)} training rows and {len(held_out)} held-out rows in {folder}")
