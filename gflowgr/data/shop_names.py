"""Names of the built-in shop: departments > categories > product types, and words for titles."""

from __future__ import annotations

# 8 departments x 4 categories x 4 product types; types are in the singular, as titles need them.
CATALOGUE: dict[str, dict[str, tuple[str, str, str, str]]] = {
    "Sports": {
        "Running": ("trail running shoe", "running jacket", "hydration belt", "running watch"),
        "Cycling": ("bike helmet", "bike light", "cycling glove", "floor pump"),
        "Camping": ("sleeping bag", "two-person tent", "camping stove", "head torch"),
        "Fitness": ("yoga mat", "kettlebell", "resistance band", "foam roller"),
    },
    "Kitchen": {
        "Cookware": ("frying pan", "stock pot", "wok", "baking tray"),
        "Coffee": ("coffee grinder", "moka pot", "milk frother", "pour-over dripper"),
        "Knives": ("chef's knife", "bread knife", "paring knife", "sharpening stone"),
        "Storage": ("lunch box", "spice jar", "bread bin", "vacuum flask"),
    },
    "Beauty": {
        "Skin care": ("face cream", "cleansing gel", "sunscreen", "clay mask"),
        "Make-up": ("lipstick", "mascara", "eye shadow palette", "concealer"),
        "Hair": ("shampoo", "hair dryer", "hair mask", "round brush"),
        "Nails": ("nail lacquer", "cuticle oil", "nail file", "base coat"),
    },
    "Music": {
        "Guitars": ("acoustic guitar", "guitar strap", "set of guitar strings", "guitar stand"),
        "Keyboards": ("stage piano", "sustain pedal", "keyboard bag", "synthesiser"),
        "Recording": ("microphone", "audio interface", "pop filter", "monitor headphone"),
        "Drums": ("snare drum", "pair of drum sticks", "practice pad", "ride cymbal"),
    },
    "Books": {
        "Fiction": ("crime novel", "fantasy novel", "family saga", "short story collection"),
        "Children": ("picture book", "bedtime story", "activity book", "young reader"),
        "Science": ("astronomy book", "biology book", "mathematics book", "history of science"),
        "Travel": ("city guide", "hiking guide", "travel journal", "road atlas"),
    },
    "Garden": {
        "Tools": ("garden spade", "pruning shear", "leaf rake", "hand trowel"),
        "Plants": ("tomato seed set", "lavender plant", "rose bush", "herb kit"),
        "Furniture": ("garden chair", "parasol", "folding table", "hammock"),
        "Watering": ("watering can", "garden hose", "sprinkler", "rain barrel"),
    },
    "Electronics": {
        "Audio": ("portable speaker", "pair of earbuds", "turntable", "sound bar"),
        "Photography": ("compact camera", "tripod", "camera bag", "prime lens"),
        "Computing": ("mechanical keyboard", "wireless mouse", "webcam", "laptop stand"),
        "Smart home": ("smart bulb", "video doorbell", "thermostat", "motion sensor"),
    },
    "Toys": {
        "Building": ("brick set", "marble run", "model railway", "magnet tile set"),
        "Games": ("board game", "card game", "jigsaw puzzle", "dice game"),
        "Crafts": ("paint set", "bead kit", "modelling clay", "origami kit"),
        "Outdoor": ("kite", "skipping rope", "water blaster", "scooter"),
    },
}

STYLES = ("classic", "light", "compact", "premium", "everyday", "vintage", "slim", "pro")
COLOURS = (
    "light blue",
    "forest green",
    "charcoal",
    "ivory",
    "coral",
    "mustard",
    "burgundy",
    "lilac",
    "silver",
    "sand",
)
