#!/usr/bin/env python3
"""Generates the quickstart's preference data: FOLDER/train.jsonl and FOLDER/test.jsonl.

    make_preferences.py FOLDER

A prompt asks a question and for the form of the answer. The chosen answer has that form; the
rejected one says the same in a form that other prompts ask for. Every ordered pair of forms occurs
equally often, so the answers alone do not tell which one was chosen: a model must read the
prompt. Training asks for capitals of countries; the test asks for animal sounds and for sums.
Seeded: the same files every time. Standard library only.
"""

import itertools
import json
import os
import pathlib
import random
import sys

TRAIN_PAIRS = 952  # 17 times the 56 ordered pairs of forms
TEST_PAIRS = 224  # twice for each topic
SEED = 20

CAPITALS = {
    "Albania": "Tirana", "Algeria": "Algiers", "Angola": "Luanda", "Argentina": "Buenos Aires",
    "Armenia": "Yerevan", "Australia": "Canberra", "Austria": "Vienna", "Bangladesh": "Dhaka",
    "Belarus": "Minsk", "Belgium": "Brussels", "Brazil": "Brasilia", "Bulgaria": "Sofia",
    "Cambodia": "Phnom Penh", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Cyprus": "Nicosia",
    "Denmark": "Copenhagen", "Ecuador": "Quito", "Egypt": "Cairo", "Estonia": "Tallinn",
    "Ethiopia": "Addis Ababa", "Fiji": "Suva", "Finland": "Helsinki", "France": "Paris",
    "Georgia": "Tbilisi", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
    "Hungary": "Budapest", "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta",
    "Iran": "Tehran", "Iraq": "Baghdad", "Ireland": "Dublin", "Italy": "Rome",
    "Jamaica": "Kingston", "Japan": "Tokyo", "Jordan": "Amman", "Kenya": "Nairobi",
    "Laos": "Vientiane", "Latvia": "Riga", "Lebanon": "Beirut", "Libya": "Tripoli",
    "Lithuania": "Vilnius", "Madagascar": "Antananarivo", "Malta": "Valletta", "Mexico": "Mexico City",
    "Moldova": "Chisinau", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", "Nepal": "Kathmandu",
    "New Zealand": "Wellington", "Nigeria": "Abuja", "Norway": "Oslo", "Pakistan": "Islamabad",
    "Panama": "Panama City", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Qatar": "Doha", "Romania": "Bucharest", "Russia": "Moscow", "Senegal": "Dakar",
    "Serbia": "Belgrade", "Slovakia": "Bratislava", "Slovenia": "Ljubljana", "Somalia": "Mogadishu",
    "South Korea": "Seoul", "Spain": "Madrid", "Sudan": "Khartoum", "Sweden": "Stockholm",
    "Thailand": "Bangkok", "Tunisia": "Tunis", "Turkey": "Ankara", "Uganda": "Kampala",
    "Ukraine": "Kyiv", "Uruguay": "Montevideo", "Vietnam": "Hanoi", "Zambia": "Lusaka",
}
SOUNDS = {
    "cow": "moos", "dog": "barks", "cat": "meows", "duck": "quacks", "sheep": "bleats",
    "horse": "neighs", "lion": "roars", "snake": "hisses", "owl": "hoots", "frog": "croaks",
    "bee": "buzzes", "pig": "oinks", "wolf": "howls", "rooster": "crows", "mouse": "squeaks",
    "donkey": "brays", "elephant": "trumpets", "pigeon": "coos", "turkey": "gobbles", "bird": "chirps",
}
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()

# A fact is a question, its answer in short, as a sentence, and what kind of thing the answer is.


def capital_facts():
    for country, city in CAPITALS.items():
        yield f"What is the capital of {country}?", city, f"The capital of {country} is {city}.", "city"


def sound_facts():
    for animal, verb in SOUNDS.items():
        article = "an" if animal[0] in "aeiou" else "a"
        yield f"Which sound does {article} {animal} make?", verb, f"{article.capitalize()} {animal} {verb}.", "sound"


def sum_facts():
    for a, b in itertools.product(range(2, 11), repeat=2):
        total = NUMBERS[a + b]
        yield f"What is {a} plus {b}?", total, f"{NUMBERS[a].capitalize()} plus {NUMBERS[b]} is {total}.", "number"


# A form is how prompts ask for it, and how a fact's answer looks in it.
FORMS = {
    "short": (
        ("Give the answer alone, without a sentence.", "Reply with the bare answer and nothing else.",
         "Name only the answer."),
        lambda answer, sentence, kind: answer,
    ),
    "sentence": (
        ("Answer in a full sentence.", "Write one complete sentence.", "Reply with a whole sentence."),
        lambda answer, sentence, kind: sentence,
    ),
    "list": (
        ("Answer as a numbered list.", "Use a list with numbers.", "Put the answer into a numbered list."),
        lambda answer, sentence, kind: f"1. {answer}",
    ),
    "capitals": (
        ("Write in capital letters.", "Answer in upper case.", "USE ONLY CAPITAL LETTERS."),
        lambda answer, sentence, kind: sentence.upper(),
    ),
    "json": (
        ("Answer in JSON.", "Reply with a JSON object.", "Give the answer as JSON."),
        lambda answer, sentence, kind: json.dumps({"answer": answer}),
    ),
    "unit": (
        ("Put what kind of thing it is in brackets.", "After the answer, add its kind in brackets.",
         "State the kind of the answer in brackets."),
        lambda answer, sentence, kind: f"{answer} ({kind})",
    ),
    "bold": (
        ("Write the answer in bold Markdown.", "Use Markdown bold.", "Make the answer bold."),
        lambda answer, sentence, kind: f"**{answer}**",
    ),
    "quoted": (
        ("Put quotation marks around the answer.", "Quote the answer.", "Answer in double quotes."),
        lambda answer, sentence, kind: f'"{answer}"',
    ),
}


def preference(fact, wanted, other, rng):
    question, answer, sentence, kind = fact
    instruction = rng.choice(FORMS[wanted][0])
    order = (question, instruction) if rng.random() < 0.5 else (instruction, question)

    def reply(form):
        return [{"role": "assistant", "content": FORMS[form][1](answer, sentence, kind)}]

    return {"prompt": [{"role": "user", "content": " ".join(order)}], "chosen": reply(wanted), "rejected": reply(other)}


def preferences(facts, count, rng):
    """`count` rows: the ordered pairs of forms in turn, so that all occur equally often, each with a fact."""
    pairs = itertools.cycle(itertools.permutations(FORMS, 2))
    rows, deck = [], []
    for wanted, other in itertools.islice(pairs, count):
        deck = deck or rng.sample(facts, len(facts))
        rows.append(preference(deck.pop(), wanted, other, rng))
    rng.shuffle(rows)
    return rows


def write_jsonl(path, rows):
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(partial, path)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    train = preferences(list(capital_facts()), TRAIN_PAIRS, random.Random(SEED))
    half, rng = TEST_PAIRS // 2, random.Random(SEED + 1)
    test = preferences(list(sound_facts()), half, rng) + preferences(list(sum_facts()), TEST_PAIRS - half, rng)
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "test.jsonl", test)
    print(f"[data] {len(train)} pairs on capitals to train, {len(test)} on animal sounds and sums to test, in {folder}",
          file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"make_preferences: {error}")
