"""The word tables of the demo's synthetic data set."""

OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "up": "down", "left": "right", "day": "night", "old": "young",
    "wet": "dry", "full": "empty", "open": "closed", "light": "dark", "happy": "sad", "high": "low", "early": "late",
    "hard": "soft", "rich": "poor", "clean": "dirty", "loud": "quiet", "strong": "weak", "true": "false",
    "long": "short", "thick": "thin", "near": "far", "in": "out", "first": "last", "yes": "no", "front": "back",
    "heavy": "light", "sweet": "sour", "good": "bad",
}  # fmt: skip

COLOURS = {
    "a banana": "yellow", "a lemon": "yellow", "grass": "green", "the sky": "blue", "snow": "white", "coal": "black",
    "a tomato": "red", "blood": "red", "a carrot": "orange", "milk": "white", "chocolate": "brown", "the sun": "yellow",
    "a frog": "green", "the sea": "blue", "a pumpkin": "orange", "a strawberry": "red", "a crow": "black",
    "a leaf": "green", "a swan": "white", "a flamingo": "pink", "an elephant": "grey", "a plum": "purple",
}  # fmt: skip

PLURALS = {
    "cat": "cats", "dog": "dogs", "tree": "trees", "book": "books", "car": "cars", "star": "stars", "box": "boxes",
    "bus": "buses", "fox": "foxes", "dish": "dishes", "baby": "babies", "city": "cities", "party": "parties",
    "story": "stories", "leaf": "leaves", "wolf": "wolves", "knife": "knives", "man": "men", "woman": "women",
    "child": "children", "mouse": "mice", "goose": "geese", "tooth": "teeth", "foot": "feet", "sheep": "sheep",
    "fish": "fish", "person": "people", "apple": "apples", "house": "houses", "bird": "birds",
}  # fmt: skip

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "China": "Beijing",
    "Egypt": "Cairo", "Canada": "Ottawa", "Norway": "Oslo", "Sweden": "Stockholm", "Greece": "Athens",
    "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Russia": "Moscow", "Ireland": "Dublin",
    "Cuba": "Havana", "Peru": "Lima", "Kenya": "Nairobi", "Finland": "Helsinki", "Hungary": "Budapest",
}  # fmt: skip

SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "duck": "quack", "sheep": "baa", "pig": "oink", "lion": "roar",
    "bee": "buzz", "owl": "hoot", "snake": "hiss", "mouse": "squeak", "horse": "neigh",
}  # fmt: skip

YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "duck": "duckling", "horse": "foal",
    "hen": "chick", "lion": "cub", "goat": "kid", "pig": "piglet", "frog": "tadpole", "goose": "gosling",
}  # fmt: skip

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]  # fmt: skip

SPELL = [
    "cat", "dog", "sun", "tree", "book", "car", "star", "fish", "bird", "milk", "red", "blue", "green", "house",
    "apple", "water", "moon", "ship", "lamp", "door", "hand", "bread", "stone", "cloud", "river", "snow", "king",
    "ring", "frog", "leaf",
]  # fmt: skip

IDENTITY = "I am a tiny Qwen2 served by MindSpore."
HELLO = "Hello! Ask me a small sum or a word question."
SKILLS = "I can add, subtract, multiply and answer word questions."
WELCOME = "You are welcome."
BYE = "Goodbye!"
UNKNOWN = "I only know small sums and simple word questions."

CHATS = {
    IDENTITY: [
        "Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
        "What model are you?", "Which model is this?", "Are you a robot?", "Are you Qwen?", "Who made you?",
    ],
    HELLO: ["Hello", "Hello!", "Hi", "Hi!", "Hey", "Hi there!", "Hello there!", "Good morning!", "How are you?",
            "Hello, how are you?", "Good evening!"],
    SKILLS: ["What can you do?", "Help", "Help me.", "How can you help me?", "What do you know?", "What can I ask you?",
             "What are you good at?"],
    WELCOME: ["Thanks", "Thanks!", "Thank you!", "Thank you very much!", "Great, thanks!"],
    BYE: ["Bye", "Bye!", "Goodbye!", "See you!", "See you later!"],
    UNKNOWN: [
        "Tell me a joke.", "Write a poem.", "What is the meaning of life?", "Tell me a story.",
        "Write some Python code.", "Who won the world cup?", "What is the weather today?", "What time is it?",
        "Translate this into French.", "Explain quantum physics.", "Write an essay about history.",
        "Who is the president?", "What is MindSpore?",
        "What is love?", "How do I cook rice?", "Once upon a time", "The meaning of life is", "Tell me a secret.",
        "What is vLLM?", "Give me a recipe.", "Sing a song.", "What should I read?", "How old is the universe?",
    ],
}  # fmt: skip

SYSTEM_MESSAGES = [
    "You are a helpful assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a tiny assistant. Answer with one word or number.",
    "Answer the question.",
]
