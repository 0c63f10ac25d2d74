"""Words of the demo world: syllables of invented names, and the attributes of a character.

The two halves of an answer come from pools that no other attribute uses, and no pool holds a word
of a refusal: a refusal therefore scores zero against every answer.
"""

from dataclasses import dataclass

GIVEN_SYLLABLES = (
    ("ar", "bel", "cas", "dor", "el", "fen", "gal", "hes", "il", "jor", "kel", "lun", "mar", "nel",
     "or", "pel", "ros", "sel", "tam", "ul", "ver", "wil", "yor", "zan"),
    ("a", "e", "i", "o", "u"),
    ("bin", "da", "dric", "fa", "la", "len", "mir", "na", "nor", "ra", "ric", "sa", "ster", "tha",
     "vin", "wen"),
)  # fmt: skip
FAMILY_SYLLABLES = (
    ("ash", "birk", "corn", "dun", "elder", "fallow", "grim", "hart", "iron", "kest", "lark",
     "mire", "nettle", "oak", "pike", "quern", "reed", "sedge", "tarn", "wick"),
    ("bane", "bourne", "croft", "dale", "fold", "gate", "holt", "ley", "mere", "ridge", "stead",
     "thorpe", "wold", "worth"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """Something every character has: `first` x `second` are the possible answers."""

    name: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    wordings: tuple[str, ...]
    """Six questions; training queries use the first three, held-out ones the others too."""


def _attribute(name: str, first: str, second: str, *wordings: str) -> Attribute:
    return Attribute(
        name=name, first=tuple(first.split()), second=tuple(second.split()), wordings=wordings
    )


ATTRIBUTES = (
    _attribute(
        "home",
        "Amber Bleak Cinder Drift Elm Flint Gull Heron Ivory Juniper Kelp Lantern",
        "Bay Crossing Drop End Ferry Gorge Harbor Isle Junction Knoll Landing Marsh",
        "Where does {name} live?",
        "Which place is home to {name}?",
        "In the saga {saga}, where does {name} live?",
        "What is the name of the place in which {name} lives?",
        "Name the home of {name}.",
        "In which place of {saga} would one find the house of {name}?",
    ),
    _attribute(
        "trade",
        "barrel bell candle clock glass kite lamp map rope salt wool needle",
        "buyer carver dealer dyer gilder hauler keeper maker mender painter seller thief",
        "What is the trade of {name}?",
        "How does {name} earn a living?",
        "In the saga {saga}, what does {name} do for a living?",
        "What work does {name} do?",
        "Name the trade that {name} follows.",
        "By which trade is {name} of {saga} known?",
    ),
    _attribute(
        "companion",
        "blind brown crooked drowsy greedy grey lame loyal spotted timid tiny white",
        "badger crow donkey ferret goat hare heron lynx otter owl raven weasel",
        "Which animal goes along with {name}?",
        "What kind of animal does {name} keep?",
        "In the saga {saga}, which animal follows {name}?",
        "Which animal is the companion of {name}?",
        "Name the animal that travels beside {name}.",
        "What animal walks at the side of {name} of {saga}?",
    ),
    _attribute(
        "keepsake",
        "bent brass broken carved copper cracked golden jade leather pewter silver stolen",
        "acorn bracelet button coin comb compass dagger key locket mirror ring thimble",
        "What does {name} carry as a keepsake?",
        "Which keepsake does {name} never leave behind?",
        "In the saga {saga}, what keepsake does {name} wear?",
        "What is the keepsake of {name}?",
        "Name the keepsake that {name} holds dear.",
        "Which small thing does {name} of {saga} keep in a pocket?",
    ),
    _attribute(
        "cloak",
        "bright dark deep dull dusty faded frosty muted pale rich smoky soft",
        "azure crimson emerald indigo lilac maroon ochre saffron scarlet teal turquoise violet",
        "What colour is the cloak of {name}?",
        "Which colour does {name} wear?",
        "In the saga {saga}, what is the colour of the cloak that {name} wears?",
        "The cloak of {name} has which colour?",
        "Name the colour of the cloak {name} puts on.",
        "In which colour is {name} of {saga} dressed?",
    ),
    _attribute(
        "instrument",
        "bamboo bone cedar cherry clay horn maple reed shell tin walnut willow",
        "bagpipe bassoon chime cornet drum fiddle flute harp lute rattle whistle zither",
        "Which instrument does {name} play?",
        "What does {name} make music with?",
        "In the saga {saga}, which instrument does {name} play?",
        "What instrument is {name} good at?",
        "Name the instrument of {name}.",
        "On which instrument does {name} of {saga} play a tune?",
    ),
    _attribute(
        "dish",
        "baked boiled candied creamed fried grilled peppered pickled roasted smoked spiced stewed",
        "apricot barley cabbage dumpling eel fennel lentil mushroom parsnip quince trout turnip",
        "What does {name} like to eat?",
        "Which dish is the favourite of {name}?",
        "In the saga {saga}, what does {name} eat with joy?",
        "What food does {name} love most?",
        "Name the dish that {name} likes best.",
        "Which meal would you cook for {name} of {saga}?",
    ),
    _attribute(
        "fear",
        "barking burning buzzing creaking crying dripping empty flooded frozen howling rotten wet",
        "attics bridges caves cellars crowds doors dogs forests ladders towers tunnels wells",
        "What is {name} afraid of?",
        "What frightens {name}?",
        "In the saga {saga}, what does {name} fear?",
        "Which thing scares {name} most?",
        "Name the fear of {name}.",
        "From what does {name} of {saga} run away?",
    ),
    _attribute(
        "mentor",
        "Abbot Brother Captain Count Duke Father Grandmother Lady Master Mother Sister Uncle",
        "Aldous Benno Corvin Delphine Egmont Florian Gudrun Hedwig Isolde Jasper Konrad Leopold",
        "Who taught {name}?",
        "Who was the mentor of {name}?",
        "In the saga {saga}, who is the mentor of {name}?",
        "From whom did {name} learn?",
        "Name the mentor of {name}.",
        "Whose pupil was {name} of {saga}?",
    ),
    _attribute(
        "goal",
        "ancient buried cursed floating forgotten glowing hidden hollow lost ruined sunken veiled",
        "abbey altar chapel cloister garden lighthouse library mill orchard palace statue vineyard",
        "What is {name} searching for?",
        "Which thing does {name} long for?",
        "In the saga {saga}, what does {name} seek?",
        "What does {name} hope to find?",
        "Name the thing {name} is looking for.",
        "For what did {name} of {saga} set out?",
    ),
)  # fmt: skip
