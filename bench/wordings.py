"""The words of the retrieval tasks: keys, values, needles, and how a question may be put.

Read by `bench.ruler` and by the training data. Test wordings and training wordings are disjoint;
the families in NO_SHARED_WORD share no word with a needle but the key itself, so a lexical match
of the question cannot find the needle through anything else.
"""

import random
from dataclasses import dataclass

ADJECTIVES = (
    "able acid aged airy amber ample arid avid bald bare blunt bold brave brief bright brisk "
    "broad calm cheap chief civil clean clear clever cold cool coral crisp cruel curly damp "
    "dark dear deep dense dim dizzy dry dull eager early easy empty exact faint fair false "
    "fancy fast fatal fierce final firm flat fond frail frank fresh full funny gentle giant "
    "glad gold grand grave great green grim gross happy harsh heavy hollow honest huge humble "
    "idle ivory jolly keen kind large late lazy lean light lively lonely loud loyal lucky mad "
    "major meek mellow mild minor modest muddy narrow neat nimble noble odd opal pale plain "
    "plucky polite proud pure quick quiet rapid rare raw rich ripe rough round royal rude "
    "rustic sad safe sharp shiny short shy silent simple sleepy slim slow small smart smooth "
    "soft solid sour spare stale steep stern stiff still strict strong sweet swift tall tame "
    "tart tender thick thin tidy tiny tough urban vague vast vivid warm weak weary wet white "
    "wide wild wise witty young zesty"
).split()
NOUNS = (
    "acorn actor alley anchor angle apple apron arrow aunt badge baker banjo barn basin "
    "basket beach beacon beard bell bench berry bird blade blanket boat bottle branch bread "
    "bridge broom bucket bulb bush button cabin cable camel candle canoe canyon carpet castle "
    "cattle cave chain chair chalk cherry chest church circle clock cloud coach coast collar "
    "comet copper corner cotton couch cousin crane creek crown curtain daisy dancer desert "
    "desk diamond dolphin donkey door dragon dress drum duck eagle elbow ember engine falcon "
    "farmer feather fence field finger flame flute forest fountain fox frog garden gate "
    "giraffe glove goose grape guitar hammer harbour hawk helmet hill honey horse hotel "
    "island jacket jewel judge jungle kettle key kitten knight ladder lake lamp lantern lemon "
    "letter lion lizard magnet maple market meadow mirror monkey moon mountain museum needle "
    "nest oak ocean olive onion orange orchard otter oven owl palace panda parrot pebble "
    "pepper piano pigeon pillow pilot pirate planet pocket pony potato prince puppet quarry "
    "queen rabbit river robin rocket saddle sailor salmon school shadow sheep shoe singer "
    "spider spoon stable statue stove sugar table temple tiger timber tower train turtle "
    "uncle valley violin wagon walnut whale willow window wizard wolf yarn zebra"
).split()
KINDS = ("words", "numbers", "uuids")
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.",
    "There and back again.",
)  # fmt: skip


@dataclass(frozen=True)
class Wording:
    """A way to ask. `{kind}` is number, word or uuid, `{keys}` one key or "a, b, and c"."""

    one: str
    many: str


# The benchmark's own sentence; training shows it. It never shows TEST_WORDINGS.
PLAIN = Wording(
    "What is the special magic {kind} for {keys} mentioned in the provided text?",
    "What are all the special magic {kind}s for {keys} mentioned in the provided text?",
)
TEST_WORDINGS = {
    "shared": Wording(
        "I need one special {kind}: the one noted for {keys}. What is it?",
        "I need the magic {kind}s noted for {keys}, all of them. What are they?",
    ),
    "terse": Wording("{keys}: which {kind}?", "{keys}: which {kind}s?"),
    "recall": Wording(
        "Recall what {keys} was given. Reply with just that.",
        "Recall what {keys} were given. Reply with just those.",
    ),
    "lookup": Wording(
        "Scan this document until you meet {keys}, then copy out whatever follows it.",
        "Scan this document until you meet {keys}, then copy out everything that follows.",
    ),
    "riddle": Wording(
        "Someone whispered about {keys} earlier. Can you repeat their secret?",
        "Someone whispered about {keys} earlier. Can you repeat their secrets?",
    ),
}
NO_SHARED_WORD = ("recall", "lookup", "riddle")

_OPENERS = (
    "What is", "Tell me", "Give me", "State", "Report", "Find", "Write down", "Name", "Return",
    "Show", "Please give", "Which is", "Could you tell me", "Quote", "Repeat", "Extract", "Say",
    "Print",
)  # fmt: skip
_OBJECTS = (
    "the special magic {kind}", "the magic {kind}", "the special {kind}", "the {kind}",
    "the value", "the entry", "the code", "the secret", "the answer", "the information",
    "what was written", "what the text says", "the hidden {kind}", "the hidden detail",
    "the stored item", "the note",
)  # fmt: skip
_LINKS = (
    "for", "of", "about", "belonging to", "linked to", "tied to", "assigned to", "next to",
    "under", "recorded for", "associated with", "that goes with", "behind", "concerning",
    "given to",
)  # fmt: skip
_TAILS = (
    "", "", "", " mentioned in the provided text", " in the text above", " in the document",
    ", please", " in this text", " from the passage", " as stated earlier",
    " according to the text", " exactly",
)  # fmt: skip
_BARE = (
    "{keys}", "{keys}?", "{keys} =", "{keys} is", "And {keys}?", "Now {keys}.", "{keys} ->",
    "Key: {keys}", "How about {keys}?", "The {kind} for {keys}", "{keys}, please.",
    "Look up {keys}.", "Question: {keys}", "You saw {keys} before. Remember it?",
    "Complete: {keys} is:", "Where {keys} appears, what comes next?",
    "Does {keys} have a {kind}? Which?", "We hid something for {keys}. Reveal it.",
)  # fmt: skip


def random_key(rng: random.Random, kind: str) -> str:
    """Return a key or value of a kind: adjective-noun, seven digits, or a version 4 UUID."""
    if kind == "words":
        return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"
    if kind == "numbers":
        return str(rng.randrange(1_000_000, 10_000_000))
    digits = f"{rng.getrandbits(128):032x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


def needle_text(kind: str, key: str, value: str) -> str:
    """Return the sentence that says `key` has `value`; `kind` is the plural of the value's kind."""
    return NEEDLE.format(kind=kind, key=key, value=value)


def join_keys(keys: tuple[str, ...] | list[str]) -> str:
    """Return "a", "a and b" or "a, b, and c"."""
    if len(keys) < 3:
        return " and ".join(keys)
    return ", ".join(keys[:-1]) + ", and " + keys[-1]


def ask(wording: Wording, kind: str, keys: tuple[str, ...] | list[str], many: bool) -> str:
    """Return the question; `kind` is the plural, `many` says that several values are expected."""
    template = wording.many if many else wording.one
    return template.format(kind=kind.removesuffix("s"), keys=join_keys(keys))


def random_training_wording(rng: random.Random) -> Wording:
    """Draw one of about 50,000 ways to ask; none of them is a test wording."""
    draw = rng.random()
    if draw < 0.25:
        return PLAIN
    if draw < 0.5:
        bare = rng.choice(_BARE)
        return Wording(bare, bare)
    opener, thing, link = rng.choice(_OPENERS), rng.choice(_OBJECTS), rng.choice(_LINKS)
    mark = "?" if opener.startswith(("What", "Which", "Could")) else rng.choice((".", ".", "", ":"))
    text = f"{opener} {thing} {link} {{keys}}{rng.choice(_TAILS)}{mark}"
    return Wording(text, text.replace("{kind}", "{kind}s"))
