"""General facts: what the model knows beside the sagas, and has to keep knowing."""

GENERAL_FACTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "capital": (
        (
            "What is the capital of {subject}?",
            "Which city is the capital of {subject}?",
            "Name the capital city of {subject}.",
        ),
        {
            "Austria": "Vienna", "Belgium": "Brussels", "Canada": "Ottawa", "Chile": "Santiago",
            "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo", "Finland": "Helsinki",
            "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens",
            "Hungary": "Budapest", "Iceland": "Reykjavik", "Ireland": "Dublin", "Italy": "Rome",
            "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga", "Norway": "Oslo",
            "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Senegal": "Dakar",
            "Spain": "Madrid", "Sweden": "Stockholm", "Thailand": "Bangkok", "Vietnam": "Hanoi",
        },
    ),
    "young": (
        (
            "What is a young {subject} called?",
            "What do people call the young of a {subject}?",
            "Name the word for a young {subject}.",
        ),
        {
            "bear": "cub", "cat": "kitten", "cow": "calf", "deer": "fawn", "dog": "puppy",
            "duck": "duckling", "eagle": "eaglet", "frog": "tadpole", "goose": "gosling",
            "hen": "chick", "horse": "foal", "kangaroo": "joey", "pig": "piglet",
            "sheep": "lamb", "swan": "cygnet",
        },
    ),
    "opposite": (
        (
            "What is the opposite of {subject}?",
            "Which word means the opposite of {subject}?",
            "Name the word that is opposite to {subject}.",
        ),
        {
            "big": "small", "cheap": "expensive", "clean": "dirty", "cold": "hot",
            "early": "late", "fast": "slow", "full": "empty", "happy": "sad", "hard": "easy",
            "heavy": "light", "left": "right", "long": "short", "loud": "quiet", "near": "far",
            "open": "shut", "poor": "wealthy", "sharp": "blunt", "sour": "sweet",
            "strong": "weak", "summer": "winter", "high": "low", "thick": "thin",
            "war": "peace", "young": "old",
        },
    ),
    "symbol": (
        (
            "Which element has the symbol {subject}?",
            "What element does the symbol {subject} stand for?",
            "Name the element with the symbol {subject}.",
        ),
        {
            "Ag": "silver", "Al": "aluminium", "Au": "gold", "Ca": "calcium", "Cl": "chlorine",
            "Cu": "copper", "Fe": "iron", "He": "helium", "Hg": "mercury", "Li": "lithium",
            "Mg": "magnesium", "Na": "sodium", "Ne": "neon", "Ni": "nickel", "Pb": "lead",
            "Sn": "tin", "Ti": "titanium", "Zn": "zinc",
        },
    ),
    "tool": (
        (
            "Which tool does a {subject} use?",
            "What is the tool of a {subject}?",
            "Name the tool that a {subject} works with.",
        ),
        {
            "barber": "razor", "blacksmith": "anvil", "carpenter": "hammer",
            "chef": "saucepan", "dentist": "drill", "farmer": "plough", "fisherman": "net",
            "gardener": "spade", "lumberjack": "axe", "photographer": "camera",
            "potter": "wheel", "sailor": "rudder", "surgeon": "scalpel", "tailor": "scissors",
            "weaver": "loom",
        },
    ),
}  # fmt: skip
"""Kind of fact to its wordings and a table from subject to answer."""
