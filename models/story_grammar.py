"""A grammar of little stories: the training text of the small story-telling model.

    python models/story_grammar.py [N] [seed] [--stats]

`story(rng)` makes one children's story of 150 to 320 words and says how many bits of choice went
into it. Hero, trait and place are drawn first; then the plot says which parts follow each other,
and each part is a template drawn from a table. All other facts (friend, helper, obstacle, home ...)
are drawn when a template first asks for them, and kept.

In a template {slot} is a fact of the story or, where there is none of that name, a fresh word out
of WORDS; a slot that is neither raises KeyError. {Slot} is the same with a capital. [one|two|three]
is a choice and may be nested.

All randomness goes through `Teller`, whose `bits` adds up -log2(probability) of each choice.
Nothing is drawn that the story does not use, except what steers it (the time of day of a journey,
say). Two different series of choices nearly always give different texts, so the mean of `bits` is
close to the entropy of the stories: the least code length that a model of this text could reach.
(It is an upper bound: now and then two series give the same text.)

What is left out: there is no model of the world behind the tables. That a fox can mend a clock is a
matter of taste; that the fog does not rise in the desert is seen to by giving each place its own
weather, beasts, helpers and obstacles.
"""

import math
import random
import re
import sys


class Teller:
    """Makes all random choices of one story, counts their bits, fills templates from its facts."""

    def __init__(self, rng: random.Random):
        self.rng, self.bits, self.facts, self.used = rng, 0.0, {}, []

    def pick(self, options):
        """One of the options; one that stands there twice is twice as likely."""
        choice = options[self.rng.randrange(len(options))]
        self.bits += math.log2(len(options) / options.count(choice))
        return choice

    def chance(self, p: float) -> bool:
        """True with probability p."""
        hit = self.rng.random() < p
        self.bits -= math.log2(p if hit else 1 - p)
        return hit

    def fresh(self, options):
        """One of the options that this story has not used yet."""
        choice = self.pick([option for option in options if option not in self.used] or options)
        self.used.append(choice)
        return choice

    def slot(self, name: str) -> str:
        """The fact of that name, or a fresh word of that kind.

        A function is a fact not drawn yet: it is now.
        """
        key = name[0].lower() + name[1:]
        if key in self.facts:
            text = self.facts[key]
        else:
            text = self.fill((self.pick if key == "said" else self.fresh)(WORDS[key]))
        if callable(text):
            text = self.facts[key] = text()
        return text[0].upper() + text[1:] if name[0].isupper() else text

    def fill(self, template: str) -> str:
        """The template with its choices made and its slots filled.

        Outermost first, so only what is used is drawn.
        """
        text, parts, depth = "", [], 0
        for piece in re.split(r"([\[\]|]|\{\w+\})", template):
            if depth == 0 and piece.startswith("{"):
                text += self.slot(piece[1:-1])
            elif piece == "[":
                depth += 1
                parts = [""] if depth == 1 else parts[:-1] + [parts[-1] + piece]
            elif piece == "]":
                depth -= 1
                if depth == 0:
                    text += self.fill(self.pick(parts))
                else:
                    parts[-1] += piece
            elif depth == 0:
                text += piece
            elif piece == "|" and depth == 1:
                parts.append("")
            else:
                parts[-1] += piece
        return text

    def sample(self, options, k: int) -> list:
        """k different options in random order."""
        left, chosen = list(options), []
        for _ in range(k):
            chosen.append(left.pop(left.index(self.pick(left))))
        return chosen

    def say(self, *options: str) -> str:
        """One of the templates that this story has not used yet, filled."""
        return self.fill(self.fresh(options))


def polish(text: str) -> str:
    """Puts a/an and the capitals at the start of sentences right."""
    text = re.sub(r"\b([Aa])n? (?=(?:[aeio]|u(?!s[eu]|ni)|hour|honest)(?!ne\b))", r"\1n ", text)
    return re.sub(r"(^|\n|[.!?] )(\"?)([a-z])", lambda m: m[1] + m[2] + m[3].upper(), text)


# --------------------------------------------------------------------------------------------------
# Characters

GIRLS = ("Nora Mina Lily Ada Rosa Greta Tilda Ivy Hanna Juno Clara Marta Selma Anya Leila Zoe "
         "Edith Flora Ruth Nell Kira Paula").split()
BOYS = ("Tom Felix Oskar Jonas Emil Hugo Milo Anton Otto Karim Leo Finn Ben Samuel Noah Arlo Elias "
        "Peter Ravi Jasper Theo Luca").split()
BEASTS = ("Pip Bramble Hazel Nutmeg Thistle Rufus Moss Clover Tuppence Pepper Biscuit Sorrel "
          "Bracken Juniper Barnaby Fern Ember Dusty Button Mabel Tansy Crumb").split()
OLD_WOMEN = ("Agatha Dorothea Ingrid Ottilie Prudence Tabitha Winifred Beatrix Henrietta "
             "Philippa").split()
OLD_MEN = "Bertram Cornelius Ezra Hector Magnus Silas Ulric Yusuf Ambrose Gideon".split()

SHE = dict(he="she", him="her", his="her", himself="herself")
HE = dict(he="he", him="him", his="his", himself="himself")

TRADES = ("baker miller weaver tailor blacksmith potter gardener carpenter cobbler beekeeper "
          "glassblower bookbinder candlemaker basketmaker saddler doctor").split()
OLD_TRADES = ("clockmaker cobbler tailor lamplighter gardener bookbinder toymaker potter "
              "piano-tuner map-maker button-maker umbrella-maker").split()

TRAITS = {
    "brave": [
        "{Hero} was [as brave as|braver than] [a lion|ten lions|a whole army|a knight in a song], "
        "and when others [ran away|hid|shut their eyes], {he} [took a step forward|went to have a "
        "look|stood still and looked].",
        "Nobody had ever seen {hero} run away from [a wasp|a thunderstorm|a barking dog|a hard "
        "question|a dare].",
        "{Hero} was [not big|not strong|not tall], but {he} [was brave|had courage|had a bold "
        "heart], and that was enough for [most days|nearly everything|most things in life].",
        "[Of all|Among] {folk}, {hero} was the [boldest|bravest|most daring], [even if|although] "
        "{he} never [boasted about it|bragged|spoke of it].",
    ],
    "clever": [
        "{Hero} was clever, and {his} head was always full of "
        "[plans|ideas|riddles|inventions|puzzles].",
        "When something was [stuck|tangled|jammed|too heavy], {folk} sent for {hero}, because {he} "
        "[always had an idea|could think around corners|knew a trick or two].",
        "{Hero} could [untie any knot|solve any riddle|count backwards from a thousand|turn any "
        "old box into a machine], for {he} was as clever as [a crow|an owl|three professors].",
        "In {his} pockets {hero} kept [a pencil|a bit of wire|a piece of chalk|a cork] and [some "
        "string|two nails|a magnet|a folded paper], because a clever head needs [a few "
        "tools|something to work with].",
    ],
    "shy": [
        "{Hero} was so shy that {he} [spoke in a whisper|blushed up to the ears|hid behind doors] "
        "when [visitors came|strangers said good day|anyone asked {his} name].",
        "{Hero} did not [talk|say] much, but {he} [listened|watched and listened] [better|more "
        "closely] than anybody else.",
        "{Hero} was shy and [walked on tiptoe|stayed at the edge|liked quiet corners], and so {he} "
        "[noticed|saw|heard] many [small|little|tiny] things that noisy people miss.",
        "People often [forgot|overlooked|did not see] {hero}, for {he} was [as quiet as|quieter "
        "than] [falling snow|a feather|a shadow|a candle].",
    ],
    "patient": [
        "{Hero} was the most patient [soul|creature|person] [anyone could imagine|for miles "
        "around|in the world]: {he} could [watch a seed|wait for a kettle|look at a snail|sit "
        "beside a pond] for [an hour|a whole afternoon|half a day].",
        "While others [hurried|rushed about|lost their temper], {hero} [took {his} time|did one "
        "thing after another|counted to ten and began again].",
        "{Hero} did everything slowly and [with care|with love|thoroughly], and {he} never [gave "
        "up|stopped halfway|left a thing unfinished].",
        "\"No hurry,\" was what {hero} [liked to say|said most often|used to say], for {he} had "
        "[more patience than|the patience of] [a tree|a stone|an old tortoise].",
    ],
    "kind": [
        "{Hero} had a [kind|warm|soft|good] heart and could not [pass by|walk past|see] anybody in "
        "trouble without [stopping|helping|asking what was wrong].",
        "{Hero} [shared|gave away] {his} [breakfast|cake|mittens|supper|umbrella] so often that "
        "{his} {elder} [shook {e_his} head|sighed and laughed|packed everything twice].",
        "{Hero} was kind to [everyone|all living things|great and small], even to "
        "[beetles|spiders|wasps|grumpy neighbours|worms on the path].",
        "If somebody [was crying|was sad|had a thorn in the foot|felt lonely], it was always "
        "{hero} who [came first|sat down beside them|brought a handkerchief|found a good word].",
    ],
    "curious": [
        "{Hero} was curious about everything and asked [a hundred|forty|at least thirty] questions "
        "a day.",
        "\"Why?\" was {hero}'s favourite word, and \"[how|where|what if]?\" came [right after "
        "it|close behind|second].",
        "{Hero} wanted to know [what was behind every hill|why the moon follows us|where the wind "
        "sleeps|how bees find their way|what snails think about], and {he} could not leave [a "
        "box|a lid|a door|a drawer] closed.",
        "{Hero} was so curious that {he} [looked under every stone|opened every gate|peeped into "
        "every hole|followed every sound], and {his} nose was often [dusty|scratched|muddy|dirty].",
    ],
}

ADVICE = {  # what a helper says to a hero of that trait
    "brave": ["You have more courage than [a bear|most kings|I ever had]. Use it [today|now]",
              "The first step is the [hardest|longest]. Take it, and the others will [follow|come "
              "along]",
              "[Fear|Danger] is a [dog|goose] that chases only those who run. So do not run",
              "Hold your head high and go [straight on|right through the middle]"],
    "clever": ["A [good thought|clear head] is stronger than [ten oxen|twenty arms|a hammer]",
               "Do not push [harder|with all your might]. Think [again|once more], and think "
               "[sideways|around the corner]",
               "Every [lock|knot] has its [key|end], if only you look at it [long enough|from the "
               "other side]",
               "You have [a good head on your shoulders|a quick mind]. Let it do the "
               "[work|lifting]"],
    "shy": ["You need not be loud. Those who are quiet hear what the [loud|others] miss",
            "[Listen|Watch] first, as you always do. That is your [gift|treasure|strength]",
            "A [whisper|soft voice] can go where a [shout|trumpet] cannot",
            "Do not try to be [like the others|noisy]. Do it in your own [quiet|gentle] way"],
    "patient": ["[Water|Rain] is soft, and yet it wears away the [stone|rock]. Take your time",
                "What is [worth having|good] takes a while. You know that better than [anyone|I "
                "do]",
                "Go [slowly|step by step], and you will be there [sooner|before the quick ones]",
                "The hasty [stumble|trip]. You will not, for you can wait"],
    "kind": ["A [kind word|good deed] opens more doors than [a golden key|an axe]",
             "Whoever helps [others|strangers] is never [quite alone|without friends]. Remember "
             "that",
             "Go on as you are, and look [kindly|gently] on whatever you meet",
             "Your [warm|good] heart will show you [what to do|the way], you will see"],
    "curious": ["Go on asking. One good question is worth [a bag of gold|ten answers|a dozen maps]",
                "Look [closely|behind things|where nobody looks], as you always do",
                "Those who [ask|look] get [there|far]. Those who know everything stay at home",
                "There is always one more thing to [find out|try]. Do not stop before you have "
                "found it"],
}

MORALS = {
    "brave": ["For to be brave does not mean to [feel no fear|fear nothing]; it means to [go on "
              "all the same|take the next step].",
              "And {folk} say to this day that [a small|one] brave heart is worth [a hundred "
              "swords|more than a strong arm]."],
    "clever": ["For where [strength|force] fails, a good idea often [fits through|finds a way].",
               "And that is why people there still say: first think, then [pull|push|hammer]."],
    "shy": ["And nobody ever told {hero} again to speak up, for they had learned to [lean "
            "closer|listen].",
            "For it is not always the loudest who has the most to [say|give]."],
    "patient": ["For good things [come slowly|ripen slowly], and those who can wait [find them "
                "ripe|taste them sweet].",
                "And if you ask {hero} how it is done, {he} only smiles and says: \"One step, and "
                "then another.\""],
    "kind": ["For kindness is [a seed|like bread]: it [grows when it is given away|is best when it "
             "is shared].",
             "And whoever gives a little [warmth|light] away, as {hero} did, has [no less of "
             "it|more of it than before]."],
    "curious": ["And what did {hero} do the next day? {He} asked a new question, of course.",
                "For the world is full of [doors|wonders], and they open to those who "
                "[knock|wonder]."],
}

# --------------------------------------------------------------------------------------------------
# Places
# where, here: the place as an adverb and as a noun; spots: landmarks a day's walk away; murk: what
# hides the way.

PLACES = [
    dict(where="in a [village|fishing village|little town] by the [sea|grey sea|northern sea]",
         here="the harbour", folk="the fisherfolk",
         land="The [gulls|terns|seagulls] screamed above the [roofs|masts|nets], and the air "
              "[smelled of|tasted of] [salt|tar|salt and seaweed|herring].",
         home="a [white|blue|crooked|narrow] [cottage|house] above the harbour",
         den="a [dry|sandy|snug] [hole|hollow] under an old boat",
         way="along the [cliff path|beach|dunes|shore]",
         spots=["the old lighthouse", "the seal rocks", "the whale-bone arch",
                "the wreck on the sandbank", "the Cave of Echoes"],
         times=["windy morning", "foggy evening in March", "bright summer morning",
                "stormy night in autumn", "calm day in May"],
         animals=["mouse", "hare", "cat", "hedgehog", "rabbit"],
         helpers=["net-mender", "sailor", "lighthouse keeper", "boat-builder", "grey seal",
                  "puffin", "pelican"],
         blocks=["murk", "guard", "dark", "fork", "steep"], murk="[thick|white|cold] fog",
         guard=["goose", "gander", "billy goat", "watchdog"], dark="a [sea cave|smugglers' tunnel]",
         seat=["a coil of rope", "an upturned boat", "a barrel"]),
    dict(where="in [a|an old|a deep green|a whispering] forest of [oak and beech|pine and "
               "birch|tall fir trees]",
         here="the forest", folk="the forest folk",
         land="[Moss|Ivy|Fern] grew [over every stone|between the roots|on the old trunks], and "
              "[woodpeckers|pigeons|thrushes] [hammered|called|sang] [high above|in the "
              "branches|from dawn to dusk].",
         home="a [log cabin|hut|small house] [in a clearing|between two oaks|beside a spring]",
         den="a [cosy|dry|round] [burrow|den] under [an oak|a beech|the roots of a pine]",
         way="[between the trees|along the deer path|through the ferns|over roots and moss]",
         spots=["the hollow oak", "the Foxglove Clearing", "the charcoal-burners' hut",
                "the ring of stones", "the black pool"],
         times=["golden autumn morning", "rainy day in April", "warm evening in June",
                "misty morning", "cool night"],
         animals=["fox", "squirrel", "badger", "hedgehog", "bear", "hare", "marten"],
         helpers=["woodcutter", "charcoal-burner", "mushroom-picker", "tawny owl", "raven", "mole",
                  "woodpecker"],
         blocks=["stream", "murk", "guard", "dark", "fork"], murk="[grey|damp|thick] mist",
         guard=["wild boar", "stag", "badger with a scar", "bad-tempered goose"],
         dark="a [tunnel of thorns|hollow way]", seat=["a mossy log", "a tree stump", "a root"]),
    dict(where="high up in the mountains, [where the eagles nest|under a white peak|above the "
               "clouds]",
         here="the valley", folk="the mountain people",
         land="[Bells|Goat bells|Cowbells] [rang|tinkled|jingled] on the meadows, and [in the "
              "evening|at sunset|at dawn] the peaks [glowed|turned] [pink|red|like embers].",
         home="a [wooden|low stone|sunny|shingled] house [on the slope|near the pass|beside the "
              "chapel]",
         den="a [snug|deep|well-swept] burrow between two boulders",
         way="[up the mule track|along the ridge|over the high meadows|across the scree]",
         spots=["the Eagle's Chair", "the blue glacier", "the hut below the pass",
                "the chapel of the winds", "the mirror lake"],
         times=["frosty morning", "clear day in September", "windy afternoon",
                "spring morning after the thaw", "starry night"],
         animals=["marmot", "goat", "hare", "bear cub", "fox"],
         helpers=["shepherd", "cheesemaker", "mountain guide", "woodcarver", "ibex", "jackdaw",
                  "eagle"],
         blocks=["stream", "murk", "guard", "dark", "steep", "fork"], murk="[icy|grey|dense] cloud",
         guard=["ram", "old billy goat", "shaggy bull", "sheepdog"],
         dark="a [narrow gorge|miners' tunnel]",
         seat=["a flat rock", "a milking stool", "a stone wall"]),
    dict(where="on a [small|lonely|cheerful|busy] farm [at the end of a lane|among barley "
               "fields|between two hills|near a mill]",
         here="the lowlands", folk="the farm folk",
         land="There were [hens|ducks|turkeys] in the [yard|orchard|straw], [a donkey|two "
              "ponies|three cows] in the [stable|meadow], and [apple|pear|plum|cherry] trees "
              "behind the [barn|house].",
         home="a [thatched|whitewashed|red brick] house [with green shutters|behind the barn|under "
              "a chestnut tree]",
         den="a [warm|soft|tidy] nest of straw behind the barn",
         way="[down the lane|across the fields|along the hedge|through the tall barley]",
         spots=["the windmill", "the far orchard", "the willow pond", "the scarecrow's hill",
                "the crooked barn"],
         times=["hot day in July", "morning in harvest time", "mild spring morning",
                "chilly October evening", "cloudy Monday"],
         animals=["lamb", "calf", "kitten", "piglet", "mouse", "puppy", "donkey"],
         helpers=["miller", "beekeeper", "farmhand", "carter", "barn owl", "cart horse", "swallow"],
         blocks=["stream", "murk", "guard", "dark", "fork"], murk="[low|milky|thick] mist",
         guard=["gander", "turkey", "bull", "rooster"], dark="a [brick culvert|long root cellar]",
         seat=["a milk churn", "a bale of hay", "a wheelbarrow"]),
    dict(where="in a [great|noisy|grand|crowded] city [of a thousand chimneys|with seven "
               "bridges|of towers and trams]",
         here="the city", folk="the neighbours",
         land="[Carriages|Trams|Carts] rattled over the cobbles, [bells struck the hours|hawkers "
              "cried their wares|somebody was always singing], and [pigeons|sparrows|starlings] "
              "[quarrelled|strutted|dozed] on the [roofs|gutters|statues].",
         home="an attic [room|flat] [above a bakery|under the roof|with a round window]",
         den="a [dry|hidden|well-kept] corner behind the bakery oven",
         way="[through the narrow streets|down Lantern Lane|past the market stalls|along the "
             "canal]",
         spots=["the old clock tower", "the botanical garden", "the theatre", "the museum steps",
                "the last tram stop"],
         times=["rainy Tuesday", "snowy evening", "busy market morning", "hot afternoon",
                "Sunday in spring"],
         animals=["mouse", "cat", "terrier", "rat", "kitten"],
         helpers=["street musician", "lamplighter", "flower seller", "chimney sweep", "librarian",
                  "pigeon", "tram driver"],
         blocks=["murk", "guard", "dark", "fork", "steep"], murk="[yellow|thick|smoky] fog",
         guard=["bulldog", "goose", "tomcat with one ear", "parrot"],
         dark="a [vaulted passage|cellar passage]",
         seat=["a doorstep", "the rim of a fountain", "a wooden crate"]),
    dict(where="at the edge of [a|the great|a golden] desert, [in a town of clay houses|beside a "
               "well|where the caravans rest]",
         here="the oasis", folk="the desert people",
         land="The [date palms|palms] [rustled|nodded|gave shade], the camels "
              "[grumbled|chewed|knelt in the dust], and the sand was [warm as bread|gold by day "
              "and blue by night|fine as flour].",
         home="a [clay|cool|flat-roofed] house [beside the well|with a fig tree in the yard|behind "
              "the bazaar]",
         den="a [cool|deep|shady] burrow under a thorn bush",
         way="[over the dunes|along the caravan trail|through the dry valley|across the hot sand]",
         spots=["the singing dunes", "the painted cave", "the ruined fort", "the twin palms",
                "the salt lake"],
         times=["cool dawn", "blazing afternoon", "moonlit night", "evening after the sandstorms",
                "market day"],
         animals=["jerboa", "fennec fox", "camel foal", "gecko", "hare"],
         helpers=["camel driver", "carpet weaver", "spice merchant", "stargazer", "tortoise",
                  "falcon", "water carrier"],
         blocks=["murk", "guard", "dark", "fork", "steep"], murk="[whirling|yellow|stinging] dust",
         guard=["camel", "billy goat", "ostrich", "watchdog"],
         dark="a [dried-up well shaft|rocky cleft]",
         seat=["a rolled-up carpet", "a camel saddle", "a warm stone"]),
    dict(where="in the far north, [where the snow never quite melts|in a land of snow|where winter "
               "lasts nine months]",
         here="the settlement", folk="the snow people",
         land="Smoke rose from the [chimneys|little houses], [icicles|long icicles] hung from "
              "every [roof|ledge|branch], and [reindeer|huskies|sledge dogs] "
              "[stamped|slept|steamed] in the snow.",
         home="a [turf-roofed|snug|timber] hut [beside the frozen lake|behind a snowdrift|under "
              "three spruces]",
         den="a [warm|snow-covered|fur-lined] den under a spruce",
         way="[across the snow|over the frozen lake|through the white birches|along the sledge "
             "track]",
         spots=["the ice arch", "the frozen waterfall", "the trapper's hut", "the leaning spruce",
                "the hot spring"],
         times=["crisp blue morning", "dim winter afternoon", "night of bright stars",
                "day in January", "white morning"],
         animals=["arctic fox", "lemming", "wolf cub", "reindeer calf", "snow hare"],
         helpers=["reindeer herder", "trapper", "ski-maker", "fur trader", "snowy owl",
                  "old walrus", "sledge-driver"],
         blocks=["murk", "guard", "dark", "fork", "steep"], murk="[blowing|whirling|blinding] snow",
         guard=["musk ox", "reindeer bull", "husky", "snow goose"], dark="an [ice tunnel|icy cave]",
         seat=["a sledge", "a pile of furs", "a chopping block"]),
    dict(where="on the bank of a [wide|slow|lazy|winding] river", here="the hamlet",
         folk="the river folk",
         land="[Barges|Rafts|Swans] [drifted by|glided past], dragonflies "
              "[glittered|hovered|danced] over the [reeds|rushes|water lilies], and the frogs "
              "[croaked|sang|complained] [all night|at dusk|until morning].",
         home="a [houseboat|cabin on stilts|house with a jetty]",
         den="a [snug|leafy|neat] burrow in the bank",
         way="[along the towpath|through the reeds|beside the water|under the willows]",
         spots=["the lock-keeper's tower", "the heron island bridge", "the old mill",
                "the three poplars", "the waterfall"],
         times=["drowsy summer noon", "grey November day", "sunny Easter morning", "rosy evening",
                "dewy morning"],
         animals=["vole", "hedgehog", "mouse", "badger", "rabbit", "shrew"],
         helpers=["lock-keeper", "raft-builder", "basket weaver", "heron", "kingfisher", "otter",
                  "toad"],
         blocks=["stream", "murk", "guard", "dark", "fork"], murk="[river|pearly|chilly] fog",
         guard=["swan", "gander", "billy goat", "bulldog"], dark="a [low tunnel|mossy culvert]",
         seat=["a mooring post", "a flat stone", "a heap of sacks"]),
    dict(where="in a [quiet|sleepy|tiny|merry] village [among the hills|behind the seven hills|in "
               "a green valley|near the border]",
         here="the village", folk="the villagers",
         land="There was a [pump|lime tree|stone bench|duck pond] in the middle, a "
              "[bakery|smithy|church with a pointed tower|schoolhouse] [beside it|on one side], "
              "and [geraniums|cabbages|sunflowers|hollyhocks] in every garden.",
         home="a [yellow|pink|leaning|tidy] house [behind the church|beside the pump|at the end of "
              "the street]",
         den="a [comfortable|dry|little] burrow under the churchyard wall",
         way="[over the hills|along the post road|through the vineyards|past the last gardens]",
         spots=["the ruined castle", "the crossroads inn", "the giant's stone", "the walnut grove",
                "the watchtower"],
         times=["fresh morning in spring", "lazy afternoon", "grey Wednesday",
                "cold evening before Christmas", "day of sun and showers"],
         animals=["hedgehog", "rabbit", "cat", "mouse", "goose", "puppy"],
         helpers=["blacksmith", "post rider", "pedlar", "schoolteacher", "tinker", "stork",
                  "magpie"],
         blocks=["stream", "murk", "guard", "dark", "steep", "fork"], murk="[white|soft|dense] fog",
         guard=["gander", "ram", "mastiff", "cow with long horns"],
         dark="a [railway tunnel|leafy tunnel]", seat=["a bench", "a garden wall", "an empty keg"]),
]

# --------------------------------------------------------------------------------------------------
# Words

BAGS = ["knapsack", "basket", "satchel", "bundle", "little bag", "rucksack"]
WORDS = {
    "said": "said said said said said murmured remarked muttered".split(),
    "asked": "asked asked sighed wondered".split(),
    "cried": "cried called exclaimed shouted".split(),
    "soon": ["before long", "after a while", "a little later", "by and by", "in the end",
             "at long last", "presently"],
    "sad": ["sad", "gloomy", "downhearted", "miserable", "close to tears", "sick at heart",
            "sorrowful", "disappointed"],
    "glad": ("glad delighted happy overjoyed merry proud thankful relieved cheerful "
             "contented").split(),
    "friendly": ["friendly", "gentle", "cheerful", "wise", "round", "thin", "wrinkled", "solemn",
                 "bright-eyed", "stout"],
    "fine": ["fine", "lovely", "splendid", "beautiful", "marvellous", "perfect", "pretty",
             "wonderful"],
    "food": ["bread and cheese", "a slice of plum cake", "two boiled eggs", "a honey bun",
             "a bag of nuts", "some dried figs", "oatcakes", "half a pie", "gingerbread",
             "a roasted chestnut or two", "barley soup", "pancakes with syrup"],
    "heart": ["{Hero}'s heart [beat fast|thumped|pounded|hammered]", "{Hero} held {his} breath",
              "{Hero} swallowed hard",
              "{Hero} felt [a tickle in {his} stomach|a lump in {his} throat]",
              "{Hero} hardly dared to blink"],
    "garment": "hat scarf coat cap waistcoat apron shawl belt cloak jacket".split(),
    "token": ["[tin|wooden|bent|silver] spoon", "[brass|glass|pearl|bone] button",
              "[rusty|tiny|brass|crooked] key", "[pink|spiral|smooth|striped] shell",
              "[grey|speckled|long|white] feather", "[chewed|short|blunt|stubby] pencil",
              "[round|speckled|flat|shiny] pebble", "[dented|silver|tiny|china] thimble",
              "[cracked|round|little|oval] mirror", "[short|crooked|dripping|half-burned] candle",
              "[green|dusty|tiny|empty] bottle", "[brown|polished|fat|hollow] acorn",
              "[bent|rusty|long|square] nail", "[wooden|broken|bone|tortoiseshell] comb",
              "[silk|velvet|crumpled|narrow] ribbon", "[glass|amber|clay|wooden] bead",
              "[foreign|copper|worn|silver] coin", "[thin|leather|tattered|squared] notebook",
              "[worn|stiff|soft|little] brush", "[wooden|empty|cotton|old] thread-reel",
              "[brass|tarnished|heavy|square] buckle", "[cracked|tiny|copper|silent] bell",
              "[torn|faded|hand-drawn|folded] map", "[spinning|painted|wooden|chipped] top",
              "[round|dented|empty|painted] tin", "[tiny|woven|broken|willow] basket",
              "[chipped|tin|blue-rimmed|egg] cup", "[milk|clay|cracked|squat] jug",
              "[iron|curved|fish|coat] hook"],
    "small_look": ("patched faded crumpled magnificent knitted threadbare brand-new spotless "
                   "striped tattered").split(),
    "beast": "sparrow crow raven finch wren lark owl dove thrush blackbird jay linnet".split(),
    "manner": ("lonely proud sleepy busy ancient fat lively cheeky bold hungry patient "
               "young").split(),
    "did": ["looked at {him}", "hurried past", "was resting on a post", "sang its song",
            "hopped along beside {him}", "preened its feathers", "kept {him} company",
            "showed no fear", "turned in a circle"],
    "dish": ("soup dumplings pancakes porridge noodles trout pudding waffles mushrooms beans pears "
             "biscuits cherries walnuts omelettes rice").split(),
    "colour": ("red blue green yellow silver white crimson violet golden scarlet purple "
               "turquoise").split(),
}

# --------------------------------------------------------------------------------------------------
# Openings

ONCE = [
    "Once upon a time, and [I have it from my aunt|every word of it is true|the owls still tell "
    "it], there lived {where} {a_hero} called {hero}.",
    "Once upon a time {a_hero} lived {where}. {Hero} was the name, and {folk} [knew it well|were "
    "fond of it].",
    "Once upon a time, there was {a_hero} named {hero}, who lived {where}.",
    "Once upon a time, {where}, there lived {a_hero} called {hero}.",
    "Once upon a time {a_hero} named {hero} lived {where}.",
    "Once upon a time, when [the moon was younger|wishes still came true|clocks went slower|the "
    "stars hung lower|bread cost a penny|there were more owls than people], {a_hero} by the name "
    "of {hero} lived {where}.",
    "Once upon a time, not [so very long ago|far from here|in my time, nor in yours], {where}, "
    "lived {a_hero} called {hero}.",
    "Once upon a time there was {a_hero}, and {he} lived {where}. {His} name was {hero}.",
]
OTHER = [
    "Long ago, {where}, there lived {a_hero} [whose name was|called|named] {hero}.",
    "Far away, [behind the blue hills|where the maps end|beyond three rivers|further than the crow "
    "flies], there lived {a_hero} called {hero}. {He} was at home {where}.",
    "{Hero} was {a_hero} who lived {where}.",
    "Everyone in {here} knew {hero}. {He} was {a_hero} and had been at home there [all {his} "
    "life|since {he} could remember|from the day {he} was born].",
    "This is the story of {hero}, {a_hero} who lived {where}.",
    "If you had come to {here} [in those days|many years ago|when your grandmother was small], you "
    "would have met {hero}, {a_hero} with [bright|laughing|dark|thoughtful|wide] eyes. {He} lived "
    "{where}.",
    "\"[Good morning, world|Another day, and who knows what it brings|Up you get, sleepyhead|What "
    "a day this will be]!\" {hero} said to {himself} every morning. {He} was {a_hero} and lived "
    "{where}.",
    "[Some|Most] stories begin with a king, but this one begins with {a_hero}. {His} name was "
    "{hero}, and {he} lived {where}.",
    "Nobody in {here} knew {a_hero} like {hero}. {He} had grown up {where}, and {he} never wanted "
    "to live anywhere else.",
    "There was once {a_hero} named {hero}. {He} lived {where}.",
]
HOMES = [
    "[{His} home was|{He} lived in] {home}.", "{He} shared {home} with {his} {elder}.",
    "There {he} had {home}, with a {token} in the window and a {colour} "
    "[mat|quilt|rug|curtain|bench] by the door.",
    "{His} {elder} and {he} lived in {home}.", "{land}",
    "{He} always wore a {small_look} {colour} [coat|jacket|cloak|waistcoat], and in its pocket "
    "{he} kept a {token}.",
    "{He} collected [things|treasures]: a {token}, a {token}, and once even a {token}.",
    "For breakfast {he} liked {dish} with {dish}, and {his} favourite colour was {colour}.",
]
SIGHTS = [  # on the way
    "There was much to see: a {token} in the dust, a {manner} {beast} on a {colour} "
    "[gate|wall|post|stone], and a {token} that [somebody|a traveller|a child] had lost.",
    "A {manner} {beast} {did}; a {manner} {beast} [called|chirped|scolded|complained] from a "
    "{colour} [post|roof|stone|fence].",
    "Once {he} stopped to pick up a {token}, once to [watch|greet|count the feathers of] a "
    "{manner} {beast}, and once to eat {dish}.",
    "To pass the time {he} thought of {dish} with {dish}, of a {manner} {beast}, and of a "
    "{small_look} {colour} {garment}.",
    "{He} met a [man|woman|pedlar|boy|girl] in a {small_look} {colour} {garment}, who gave {him} a "
    "{token} and [bowed|went on|sang|waved].",
]
PAUSES = [  # between two tries
    "To cheer {himself} up, {he} ate {dish} with {dish} and put on {his} {small_look} {colour} "
    "{garment}.",
    "A {manner} {beast} {did}, and {hero} turned a {token} over and over in {his} "
    "[hand|pocket|fingers].",
    "{His} {elder} brought {him} {dish} and a {token}, but {hero} only looked at the {colour} "
    "[evening|morning] sky.",
    "A [boy|girl|neighbour|passer-by] in a {small_look} {colour} {garment} gave {him} a {token} to "
    "[comfort|cheer] {him}.",
]
DAYS = ["One {time}", "Then one {time}", "But one {time}", "And then, one {time}",
        "On a certain {time}", "Now, one {time}"]

# --------------------------------------------------------------------------------------------------
# What is said before setting out

TALK = [
    "\"[Must you go|Do you have to go|Will you go] all alone?\" asked {his} {elder}. \"[Somebody "
    "has to|I must|I will be back before you miss me|I shall be careful]!\" {said} {hero}.",
    "{His} {elder} [looked worried|stroked {his} head|was silent for a while]. \"Then take "
    "{food},\" {e_he} {said}, \"and [a warm scarf|my walking stick|my old compass|a clean "
    "handkerchief], and [do not talk to the wind|be home when you can|keep your feet dry].\"",
    "\"I know what I have to do,\" {hero} {said}. {His} {elder} [nodded|smiled a little|sighed], "
    "packed {food} into {his} {bag} and [waved|stood at the door] until {he} was out of sight.",
    "\"It is a long way,\" {said} {his} {elder}. \"Then I had better [begin|start|leave] at "
    "once,\" said {hero}, and {e_he} could not help [laughing|smiling].",
    "{Hero} thought about it [for three days|over breakfast|the whole night|while {he} brushed "
    "{his} hair]. Then {he} put {food} into {his} {bag}, [kissed|hugged] {his} {elder} and [set "
    "out|went on {his} way].",
]
DOUBT = [
    "\"You will never [do it|manage that],\" said {friend} {the_friend}, who was {his} "
    "[best|oldest] friend. \"It is [much too hard|a hopeless business|too much for you]!\" "
    "\"[Maybe|Perhaps], but I can try,\" {said} {hero}.",
    "{His} friend {friend} {the_friend} [shook {f_his} head|wrinkled {f_his} nose|laughed]. \"[I "
    "would stay at home|That can only go wrong|You are dreaming again],\" {f_he} {said}. But "
    "{hero} had [made up {his} mind|already decided].",
    "{Hero} told {his} friend {friend} {the_friend} about it. \"[Nobody has ever done that|Leave "
    "it to the others|I would not bet a button on it],\" {friend} {said}. \"[Then I shall be the "
    "first|We shall see about that|Let me find that out myself|Somebody has to try it],\" said "
    "{hero}.",
]
DOUBT_END = [
    "{Friend} came running to meet {him}. \"I was wrong,\" {f_he} {said}, \"[and I am glad of "
    "it|and next time I will come along|forgive me].\"",
    "Even {friend}, who had [doubted|laughed|not believed in it], [clapped|cheered|danced about] "
    "and wanted to hear everything [twice|three times|from the beginning].",
    "\"I shall never say never again,\" {said} {friend}, and [gave {him} half of {f_his} "
    "cake|turned a somersault|hugged {him}].",
]

# --------------------------------------------------------------------------------------------------
# On the way: blocks and ways out

GO = [
    "[Nobody saw {hero} leave|{Hero} shut the door behind {him}]. {Soon} {he} was going {way}.",
    "Off {he} went, {way}, and a {manner} {beast} flew ahead.",
    "Step by step {hero} made {his} way {way}, thinking of {dish}.",
    "So {hero} [set out|started] {way}.",
    "{Hero} walked {way}, [humming|whistling a tune|counting {his} steps|with a stick in {his} "
    "hand].",
    "The way led {way}, and {hero} [walked and walked|hurried on|did not look back|went on until "
    "{his} feet were sore].",
    "{He} went {way}, first [quickly|at a run|in high spirits], then more and more slowly.",
    "{He} went {way}, where a {manner} {beast} {did}, with a {token} in {his} [pocket|fist|hand] "
    "for luck.",
    "In {his} {bag} {he} had a {token} and a {colour} {garment}, and so {hero} set out {way}.",
    "So {hero} went {way}. A {manner} {beast} {did}, and a {colour} [cloud|leaf|feather] "
    "[drifted|floated|sailed] by.",
]

DAYBREAK = [
    "At daybreak all was ready.", "The next morning {he} was up before the sun.",
    "{He} waited until it grew light.",
    "[Before breakfast|As soon as the cock crowed|When the lamps went out] {he} stood at the door.",
    "The night passed slowly. Then [at last|somewhere] a cock crowed.",
]
BLOCKS = {
    "stream": ["But where the path went down, a [swollen|rushing|foaming|roaring] stream cut it "
               "off, and the [footbridge|plank] was [gone|broken|washed away].",
               "Then {he} came to a stream, [brown and wild|loud and deep|white with foam] from "
               "the rain, and there was no bridge [anywhere|to be seen]."],
    "murk": ["Then {murk} [rolled in|came down|closed in], and {he} could not see [three steps "
             "ahead|{his} own feet|the path].",
             "But {murk} [swallowed|covered|hid] everything, and {soon} {hero} no longer knew "
             "[left from right|where {he} was]."],
    "guard": ["In the middle of the path stood {a_guard}. \"Nobody [passes|comes through] here!\" "
              "{g_said} {the_guard}.",
              "At a [narrow gate|gap in a wall|turn of the path] {a_guard} [blocked|barred] the "
              "way. \"Go [back|home]!\" {g_said} {the_guard}. \"[This is my path|I let nobody by|I "
              "am in a bad mood]!\""],
    "dark": ["Then the only way on led through {dark}, and it was as black [as ink|as soot|as a "
             "raven's wing] in there.",
             "But the path ended at {dark}. Inside it [dripped|rustled|was pitch dark], and [a "
             "cold draught|a strange sigh] blew out of it."],
    "fork": ["Then the path split into [three|four|five], and the signpost [had fallen over|had "
             "lost its arms|was blank].",
             "At a crossing {he} stopped, for [the wind had turned the signpost|somebody had "
             "painted over the signs], and one path looked [just like the other|as good as the "
             "next]."],
    "steep": ["Then a [wall of rock|steep slope|bare cliff] rose before {him}, as high as [ten "
              "ladders|a church].",
              "But {soon} {he} stood under a [steep|slippery|crumbling] slope with no "
              "[steps|path|railing] at all."],
}
WAYS = {
    "stream": {
        "brave": "{heart}, but {he} took [a run|three steps back], shut {his} mouth tight and "
                 "jumped. {He} landed with one foot in the [mud|water] and [laughed out loud|shook "
                 "{himself} like a dog].",
        "clever": "{Hero} [looked about|thought hard], found a [hollow|fallen] log, and with a "
                  "branch for a lever {he} [rolled|turned] it bit by bit until it reached from "
                  "bank to bank.",
        "shy": "{He} did not call for help; {he} sat [still|in the grass] and watched. So {he} saw "
               "how a wagtail hopped across on stones just under the [foam|surface], and {he} "
               "followed [the same way|its tracks].",
        "patient": "{Hero} sat down, ate {food} and waited. [Towards noon|When the shadows grew "
                   "long] the water had sunk, one stone after another came up, and {he} "
                   "[crossed|walked over] with dry feet.",
        "kind": "On the bank a beaver was [tugging|pulling] at a heavy branch, so {hero} [came to "
                "help|took hold of the other end]. \"One good turn deserves another,\" {said} the "
                "beaver, and laid a trunk across for {him}.",
        "curious": "{Hero} wanted to see where so much water came from, so {he} followed it "
                   "[uphill|around two bends]. There it squeezed between two rocks and was so "
                   "narrow that [one step|a hop] was enough.",
    },
    "murk": {
        "brave": "Others would have turned back. {Hero} [stretched out {his} arms|sang at the top "
                 "of {his} voice] and went on until it grew [bright|light] again.",
        "clever": "{Hero} found a [long thread|ball of string] in {his} pocket, tied one end to a "
                  "[post|bush] and walked ahead. So {he} could never go in a circle, and {soon} "
                  "{he} was out of it.",
        "shy": "But {hero} was used to listening. Somewhere a [bell|dog|cock] could be heard, "
               "[faint|thin] but clear, and {he} went [towards it|after the sound], step by step, "
               "until the sky was clear.",
        "patient": "{Hero} sat down on {seat}, [rubbed {his} nose|told {himself} a story|closed "
                   "{his} eyes] and waited. What comes will also go, {he} thought, and after [an "
                   "hour|two hours] it went.",
        "kind": "Then {he} heard [a thin voice|somebody crying]: a chick had lost its mother. "
                "{Hero} [warmed|comforted] it, and when the mother came [flapping|running], she "
                "led {him} safely back to the path.",
        "curious": "{Hero} bent down to see what the ground looked like close up, and [what did "
                   "{he} find|see there]: old wheel tracks! {He} followed them [on hands and "
                   "knees|nose first] into the light.",
    },
    "guard": {
        "brave": "{heart}, but {he} did not move back an inch. \"I am going through,\" {hero} "
                 "{said}, and looked {the_guard} in the eye, until {the_guard} [blinked|coughed] "
                 "and stepped aside.",
        "clever": "\"[Quite right|Very wise],\" said {hero}. \"Then nobody may stand here either, "
                  "and you are standing here.\" {The_guard} [thought about it|frowned], found no "
                  "answer, and was still thinking when {hero} had long gone by.",
        "shy": "{Hero} said nothing at all and [waited|looked at the ground]. So {he} noticed that "
               "{the_guard} was [limping|standing on three legs], and without a word {he} pulled a "
               "thorn out of its foot. After that the way was free.",
        "patient": "{Hero} sat down on {seat} and began to [count clouds|peel an apple]. {He} did "
                   "not [argue|scold]; {he} stayed. When it got [late|dark], {the_guard} yawned, "
                   "lay down and [snored|fell asleep].",
        "kind": "\"You look [tired|hungry],\" said {hero}. \"Has nobody brought you anything "
                "today?\" Nobody had. So {he} shared {food}, and {the_guard} [became quite "
                "tame|wiped away a tear] and let {him} pass.",
        "curious": "\"Why?\" asked {hero}. \"Since when? Who told you so? And what happens at "
                   "[night|weekends]?\" Nobody had ever asked {the_guard} so much. \"Oh, just "
                   "go,\" it [groaned|sighed].",
    },
    "dark": {
        "brave": "\"[Dark is only light asleep|I am not made of sugar],\" {said} {hero} and "
                 "marched in. It was [long|cold] and it smelled of [earth|mushrooms], but at the "
                 "other end [shone the sun|there was light].",
        "clever": "{Hero} [took the lid of {his} tin|polished {his} belt buckle], set it up in the "
                  "[sun|daylight] and turned it until a bright spot [danced|ran] far ahead along "
                  "the wall. By that light {he} walked through.",
        "shy": "{Hero} [listened at the entrance|put {his} ear to the wall]. The dripping came "
               "from the left, the wind from the right. So {he} kept to the right, quiet as a "
               "[bat|moth], and came out [on the far side|safely].",
        "patient": "{Hero} stood still until {his} eyes grew used to it. First {he} saw "
                   "[grey|nothing], then outlines, then [every stone|each step], and slowly {he} "
                   "walked through.",
        "kind": "At the entrance a bat had got [one wing|one foot] caught in [a net|an old sack]. "
                "{Hero} freed it very [gently|carefully]. \"I know the way without any light,\" it "
                "[squeaked|whispered], and flew ahead.",
        "curious": "But what was that on the wall? {Hero} had to look: [somebody had carved "
                   "arrows|there were painted hands] there, all pointing the same way. {He} felt "
                   "for one after another and [came out|reached the end].",
    },
    "fork": {
        "brave": "{Hero} took the one that looked most [dangerous|gloomy], because {he} thought "
                 "nobody else would have dared to. [Right it was|It was the right one].",
        "clever": "{Hero} set the old post upright so that the arm with {here} on it pointed to "
                  "where {he} had come from. So all the other arms [were right|told the truth] as "
                  "well.",
        "shy": "{Hero} stood there [quite still|without a sound] and listened. On one path the "
               "birds were silent, and on the other they [chattered|twittered]. Somebody had to be "
               "living there, and that was where {he} went.",
        "patient": "{Hero} tried one path after another, as far as the first bend, and came back "
                   "each time without [grumbling|a sigh]. The last one was the right one.",
        "kind": "There [a finch|a robin] hung head down with a thread round its foot. {Hero} "
                "untied the knot, and it [nodded|pointed its beak] towards the [middle|narrowest] "
                "path. \"Take that one,\" it said. \"The others lead [to the swamp|nowhere|back "
                "again].\"",
        "curious": "{Hero} [sniffed|poked about] and studied the ground. Why was one path so "
                   "[smooth|worn]? Because many feet had gone there, of course! {He} took that "
                   "one.",
    },
    "steep": {
        "brave": "\"Up!\" {said} {hero}, and [up {he} climbed|did not look down once]. [A stone "
                 "broke loose|The wind pulled at {him}], but {he} held on tight, and at the top "
                 "{he} [crowed|shouted] for joy.",
        "clever": "{Hero} did not climb straight up. {He} went [a little to the left, a little to "
                  "the right|in zigzags], as [clever goats do|a shoelace goes through a shoe], and "
                  "was hardly out of breath at the top.",
        "shy": "{Hero} hid behind a bush and watched two wild goats on the rock. They knew every "
               "[crack|ledge]. When they were gone, {he} climbed up exactly where they had gone.",
        "patient": "{Hero} climbed ten steps and rested, ten steps and rested. [The sun wandered "
                   "across the sky|Hours passed], but suddenly there were no more steps left.",
        "kind": "An old crow with a [lame|sore] wing sat at the bottom and [wept|sighed]. {Hero} "
                "bound up the wing and shared {food} with it. \"Then I can tell you where the "
                "hidden stairs are,\" said the crow.",
        "curious": "{Hero} wanted to know what was [behind the bushes|round the corner], and "
                   "there, under the [ivy|leaves], were [old stairs|steps in the stone] that "
                   "everyone had forgotten.",
    },
}

# --------------------------------------------------------------------------------------------------
# Helpers on the way

MEET = [
    "Near {spot2} {he} met {a_helper}, {friendly} and [busy|half asleep|deep in thought].",
    "[Beside|Close to] the path {a_helper} sat on {seat2} and [hummed a song|looked at the sky|ate "
    "{dish}|sneezed three times].",
    "There {he} met {a_helper} with a {small_look} {colour} {garment}.",
    "Suddenly somebody [coughed|chuckled|said good day]. It was {a_helper}.",
    "A voice called \"[Halloo|Wait|Watch your step]!\" from {spot2}, and {soon} {a_helper} stood "
    "before {him}.",
    "{Hero} almost stumbled over {a_helper}, who was looking for a {token}.",
    "Who came the other way? {A_helper}, {friendly} and [in no hurry|fond of company].",
    "At {spot2} {he} shared {food} with {a_helper}.",
]
GREET = [
    "\"I am {helper},\" said {the_helper}. \"What [brings you here|is the matter|has happened]?\" "
    "{Hero} told {h_him}.",
    "\"[Are you worried|Have you lost something|Why so quiet]?\" asked {the_helper}, whose name "
    "was {helper}.",
    "\"Sit down. They call me {helper},\" said {the_helper}, [moving over|making room], and {hero} "
    "[poured out {his} heart|explained it all].",
    "{Hero} [bowed|said hello]. \"My name is {helper},\" was the answer, \"and I know [every path "
    "here|that look|a thing or two].\"",
    "Everyone called {h_him} {helper}, and {h_he} [was a good listener|never laughed at a "
    "question|had time for everybody].",
    "{Helper} was {h_his} name. {H_he} let {hero} talk [to the end|until nothing was left to "
    "tell|without once breaking in].",
    "\"[Tell {helper}|Old {helper} has ears|Nothing shocks old {helper}],\" said {the_helper}, and "
    "so {hero} began.",
]
COUNSEL = [
    "{Helper} [scratched {h_his} chin|nodded slowly|thought for a while]. \"{advice}.\"",
    "\"Listen,\" {helper} said. \"{advice}.\"",
    "\"{advice},\" {said} {helper} with a [wink|smile].",
    "\"May I tell you [something|what my grandmother used to say]?\" asked {helper}. \"{advice}.\"",
    "[For a moment|At first] {helper} said nothing. Then {h_he} [smiled|looked up]. \"{advice}.\"",
    "\"{advice}.\" That was all {helper} said.",
    "\"[It happened to me once|I know that trouble],\" said {helper}. \"{advice}.\"",
    "{Helper} drew a [circle|line|star] on the ground. \"{advice},\" {h_he} {said}.",
]
MEET_HERE = [
    "[At that moment|Just then] {a_helper} came [by|along], {friendly} and [busy|in no hurry].",
    "The next day {a_helper} with a {small_look} {colour} {garment} stopped beside {him}.",
    "But somebody had [seen|noticed] it all: {a_helper}, who was [resting|eating {dish}] nearby.",
    "{Soon} {a_helper} sat down beside {him} and [offered {him} a plum|hummed a song|sneezed three "
    "times].",
    "There was one in {here} who might know what to do, {a_helper}, and {hero} went there [at "
    "once|before supper].",
    "A {colour} {garment} came round the corner, and in it was {a_helper}.",
    "{A_helper} was passing with a {token} in a {bag} and [stopped|turned back].",
]
THANKS = [
    "\"Thank you, {helper}!\" {hero} called, as loud as {he} could.",
    "The next day {he} looked in on {helper} and thanked {h_him} [with a hug|a hundred times|with "
    "{dish}].",
    "And {helper}? {H_he} got a {colour} {garment} and a {token} from {hero}.",
    "\"[I owe it to you|Without you I should have given up],\" {hero} told {helper}. \"[You did it "
    "yourself|Nonsense],\" {said} {the_helper}.",
    "{He} did not forget {helper}, who only [smiled|waved|winked] and said: \"[I knew it|Come "
    "again soon|It was a pleasure].\"",
    "A week later {the_helper} found a {token} on the doorstep, with a note: \"For {helper}, from "
    "{hero}.\"",
    "Of course {helper} was asked to supper, and there was {dish} with {dish}.",
    "{He} wrote {helper} a letter in {colour} ink, and it [was mostly thanks|began with thank "
    "you].",
    "{Hero} kept a {token} for {helper}, and {h_he} [wore it|showed it to everyone|took it "
    "everywhere].",
]

# --------------------------------------------------------------------------------------------------
# Endings

FEEL = [
    "\"[I did it|It is true|Pinch me]!\" {said} {hero}, {glad} and [out of breath|red in the "
    "face].",
    "Nobody had to ask whether {hero} was {glad}; one could see it [from afar|in the dark].",
    "{Hero} was {glad}.",
    "{Hero} felt [warm from head to toe|as tall as a tower|as if {he} could fly|lighter than a "
    "bird].",
    "[Was anybody|Could anyone be] as {glad} as {hero} that day? Hardly.",
    "{Hero} could not remember when {he} had last been so {glad}.",
    "{His} heart [sang like a kettle|glowed like an oven|leaped like a fish|rang like a bell], so "
    "{glad} was {he}.",
    "So {glad} was {hero} that {he} threw {his} {small_look} {garment} into the air and caught it "
    "[again|with one hand|behind {his} back].",
    "{Hero} [laughed and cried at once|hopped on one leg|skipped in a circle|hummed a tune], so "
    "{glad} was {he}.",
    "Something [warm|bright|soft] spread in {hero}'s chest, like [tea on a cold day|the first sun "
    "in March|a song].",
]
LAST = [
    "Before {he} fell asleep, {hero} ate {dish} and gave the last [bite|crumb] to a {manner} "
    "{beast}.",
    "What became of the {token}? {Hero} gave it to a [child|traveller|neighbour] in a {colour} "
    "{garment}.",
    "The next morning a {manner} {beast} sat [on the roof|at the window], and {hero} wished it "
    "good day.",
    "That night {hero} lay in bed and [looked at the stars|listened to the wind|could not stop "
    "smiling] until sleep came.",
    "And outside, above {here}, the moon [came up|hung] like [a slice of lemon|a lantern|a silver "
    "coin|a round cheese], and it was quiet.",
    "If you ever come to {here}, ask for {hero}. {He} will [tell you the story|make you a cup of "
    "tea|show you the way].",
    "And they all ate {dish}, {dish} and {dish} together until [the pot was empty|the candles had "
    "burned down|nobody could eat any more].",
    "For supper they had {dish} with {dish}, and on the windowsill stood a {token} and shone in "
    "the [moonlight|lamplight|dusk].",
    "Afterwards a {manner} {beast} came by, and {hero} [told it everything|wished it good "
    "night|nodded to it].",
    "{He} hung up {his} {small_look} {garment}, laid a {token} under {his} pillow and slept "
    "[soundly|deeply] until [dawn|noon|breakfast].",
    "And the {token} that {hero} found that evening in {his} pocket lies on {his} table still.",
    "One by one the lights went out. Only {hero} was still awake, and {he} was [smiling|humming].",
    "And so it was, and whoever does not believe it may go there and [see|ask].",
    "From then on {folk} greeted {hero} by name, and {he} always [waved|greeted them] back.",
    "Then {he} [yawned|stretched], blew out the candle and slept until [noon|the cock crowed|the "
    "sun tickled {his} nose].",
    "Afterwards it began to [rain|get dark], but {hero} did not mind at all.",
    "And from that day on, {hero} walked through {here} [a little straighter|with a spring in "
    "{his} step|with {his} head held high].",
    "{Folk} spoke of it for many [years|winters], and each time the story grew [a little longer|a "
    "bit taller].",
    "And if nothing has changed since then, {he} is [happy still|there to this day].",
]

# --------------------------------------------------------------------------------------------------
# Plots that are journeys
# facts: one is drawn; trouble: what is wanted; goal: what happens at {spot}; home: how it ends.

JOURNEYS = {
    "lost": dict(
        facts=[dict(thing="a [silver|tin|brass] whistle", obj="whistle"),
               dict(thing="a {colour} kite", obj="kite"),
               dict(thing="a [wooden|carved] flute", obj="flute"),
               dict(thing="a [copper|little brass] bell", obj="bell"),
               dict(thing="a ring with a {colour} stone", obj="ring"),
               dict(thing="a {colour} glass marble", obj="marble"),
               dict(thing="a [felt|velvet] hat with a {colour} ribbon", obj="hat"),
               dict(thing="a pocket watch on a chain", obj="watch")],
        trouble=["{His} greatest treasure was {thing}, a present from {his} {elder}. {day}, it was "
                 "gone. {Hero} [looked|searched] under the [bed|table|stove], behind the "
                 "[cupboard|curtains|woodpile] and even in the [teapot|flour bin|rain barrel], but "
                 "the {obj} was nowhere to be found, and {he} was {sad}.",
                 "{Hero} owned {thing}, and {he} would not have given it away for [a bag of gold|a "
                 "castle|all the sugar in the world]. {day}, a gust of wind [snatched|tore] it "
                 "from {his} hands and carried it over the [roof|trees], away towards {spot}. "
                 "\"Stop!\" {cried} {hero}, but the {obj} was gone.",
                 "{day}, {hero} put {thing} on the windowsill to [look at it|polish it]. "
                 "[Something black and white|A rascal of a magpie] [fluttered down|shot past], and "
                 "then there was no {obj} any more. {Hero} ran out of the door, {sad} and "
                 "[angry|furious]. \"I will find my {obj},\" {he} {said}, \"[and if it takes a "
                 "week|wherever it is]!\""],
        goal=["At {spot} {hero} looked into every [crack|corner|gap]. There, between [two "
              "stones|dry leaves|old feathers], something [glinted|shone|stuck out]. It was the "
              "{obj}, [a little scratched|a bit dusty|wet through], but whole!",
              "High up at {spot} there was a nest, and in the nest sat [three chicks|four hungry "
              "chicks] with the {obj} in the middle. \"May I have it back?\" asked {hero}. {He} "
              "laid [a shiny button|a glass bead|a piece of bright tin] in its place, and the "
              "mother bird [had nothing against it|agreed to the bargain].",
              "{Hero} found the {obj} at {spot}. A [small|barefoot] boy was [holding|stroking] it, "
              "and he [turned red|was frightened]. \"I [only found|only wanted to try] it,\" he "
              "{said}. So they [played|sat] together for a while, and then {hero} [carried it "
              "home|took it back] and was not angry at all."],
        home=["{He} hung the {obj} over {his} bed, beside a {token}, and [looked at it every "
              "night|never lent it to the wind again].",
              "Back at home the {obj} got [a place of honour|a ribbon|a little box of its own], "
              "and {he} looked after it better than before.",
              "{His} {elder} [laughed for joy|wiped {e_his} eyes] when {hero} held up the {obj}. "
              "\"[I would have forgiven you|You went so far for it]!\" {e_he} said.",
              "That evening {hero} held the {obj} in both hands and told {his} {elder} [where it "
              "had been|of all {he} had seen]."]),
    "medicine": dict(
        facts=[dict(thing="[silver thyme|moonwort|snow mint]", obj="herb", ill="a bad cough"),
               dict(thing="[wild honey|golden honey]", obj="honey", ill="a sore throat"),
               dict(thing="[healing water|water from the oldest spring]", obj="water",
                    ill="a high fever"),
               dict(thing="[feverfew|star root|bitter bark]", obj="medicine", ill="a fever")],
        trouble=["{day}, {his} {elder} could not get up, for {e_he} had {ill}. {E_his} "
                 "[cheeks|hands] were [hot|as white as paper], and {e_he} would not [eat|touch "
                 "{e_his} soup]. \"There is only one thing that helps,\" [the doctor|a wise "
                 "neighbour|everybody] said: \"{thing}. But it is found only near {spot}.\"",
                 "{day}, there was no [singing|laughter|clatter of plates] in the house: {his} "
                 "{elder} lay in bed with {ill}. {Hero} brought {e_him} [tea|a second pillow|a hot "
                 "stone for the feet], but it did not help. {Soon} {he} remembered an old "
                 "[song|saying] about {thing}, to be found near {spot}."],
        goal=["At {spot} {hero} [knelt down|searched on all fours], and there it was: {thing}! "
              "{He} took only as much as {he} needed, [said thank you to the earth|left the rest "
              "for others], and [wrapped it in a cloth|packed it away carefully].",
              "When {hero} reached {spot}, a [hermit|nun|beekeeper] was sitting there with a big "
              "[pot|jar]. \"{Thing}? I have some. What will you give me for it?\" \"[A song|My "
              "gloves|My supper],\" {said} {hero}, and the old one [laughed|nodded] and [filled a "
              "flask|gave {him} plenty].",
              "{Hero} had almost given up when the [last light|first star] fell on {spot}. Right "
              "there, [in a crack|under a ledge|behind a curtain of leaves], {he} found what {he} "
              "needed: {thing}."],
        home=["{His} {elder} [sniffed at it|made a face], took it all the same, and fell asleep. "
              "{Hero} sat beside the bed until morning. Then a voice asked: \"Is there any "
              "{dish}?\" and {hero} knew that all was well.",
              "{He} ran all the way back. {His} {elder} took [three spoonfuls|one sip], then "
              "another, and slept. In the morning {e_he} sat up and asked for [toast|an "
              "egg|{e_his} slippers]. The {obj} had helped!",
              "It was late when {he} came home with the {obj}. {His} {elder} [drank|swallowed] it "
              "and [pulled a face|shuddered], but after two days {e_he} was [dancing|singing] in "
              "the kitchen again."]),
    "wonder": dict(
        facts=[dict(thing="the [northern lights|green lights in the sky]", obj="lights",
                    act="[rippled|danced] over the sky like {colour} ribbons"),
               dict(thing="the [night flower|moon lily], which blooms once in [seven|ten] years",
                    obj="flower", act="opened, petal by petal, {colour} as [a dream|silk]"),
               dict(thing="the [falling stars|rain of stars]", obj="stars",
                    act="[fell|streaked] across the dark, first one, then hundreds"),
               dict(thing="the great flight of the [cranes|wild swans]", obj="birds",
                    act="came over in long lines, and their [calls|wings] filled the air"),
               dict(thing="the [comet|star with a tail]", obj="comet",
                    act="hung in the dark sky with a long {colour} tail")],
        trouble=["{His} {elder} had [often|once] told {him} about {thing}. \"[Only at {spot} can "
                 "you see it well|The best place is {spot}],\" {e_he} {said}. {day}, {hero} could "
                 "not [think of anything else|sit still any longer]. {He} wanted to see it with "
                 "{his} own eyes.",
                 "In [an old book|a calendar|a letter] {hero} had read about {thing}. It was to be "
                 "seen at {spot}, and [very soon|this very week]. {day}, {he} closed the book with "
                 "a [bang|sigh]. \"I [must|want to] see that,\" {he} said, \"[just once|and not "
                 "only read of it]!\""],
        goal=["It was night when {hero} came to {spot}. {heart}. At first there was only "
              "[darkness|silence|cold]. Then, [without a sound|all of a sudden], it happened: the "
              "{obj} {act}. {Hero} forgot [{his} sore feet|the long way|to breathe].",
              "At {spot} {he} [lay down on {his} back|sat down on {seat}] and waited until dark. "
              "{Hero} had nearly [nodded off|given up hope] when a [shimmer|whisper] went through "
              "the night. The {obj} {act}, and it was more [beautiful|wonderful|splendid] than "
              "{he} had [imagined|dreamed]."],
        home=["All the next day {hero} was [quiet|dreamy]. \"I have seen the {obj},\" {he} told "
              "everyone who asked, and also a {manner} {beast} who had not asked.",
              "At home {he} tried to tell {his} {elder} about the {obj}, but [words were too "
              "small|{he} ran out of words]. So {he} [painted|drew] it [on the wall|on a big sheet "
              "of paper].",
              "\"Well, how was it?\" asked {his} {elder}. \"[Bigger than I thought|Like music you "
              "can see],\" {hero} {said}, and {e_he} understood."]),
    "home": dict(
        facts=[dict(how="{he} had fallen asleep on a [hay cart|wagon full of sacks], and when {he} "
                        "woke up, the wheels had stopped at {spot}"),
               dict(how="{he} had run after a [runaway ball|rolling hoop|stray goose|flying hat], "
                        "on and on, until {he} stood at {spot}"),
               dict(how="a [whirlwind|great gust] had picked {him} up like a [leaf|sock on a line] "
                        "and set {him} down at {spot}"),
               dict(how="{he} had followed a [brass band|travelling circus|puppet show] until the "
                        "music stopped at {spot}")],
        trouble=["{day}, {hero} did not know where {he} was. It had come about like this: {how}. "
                 "Nothing there was [familiar|as {he} knew it], not the [smell|wind], not the "
                 "[stones|voices]. \"I want to go home,\" {he} {said}, {sad}, and thought of {his} "
                 "{elder}, who was surely [waiting|cooking supper|lighting the lamp].",
                 "{day}, {hero} got lost. It was quickly done: {how}. \"Hello?\" {he} {cried}. "
                 "Only [an echo|a cricket] answered. [Supper would be on the table now|{His} "
                 "{elder} would be at the window now], and {here} was far away."],
        goal=["From the last [rise|bend] {hero} saw it: a [light|thread of smoke], small as a "
              "[pea|pin], and then a second one. It was {here}! {He} ran so fast that {his} "
              "[hat|cap] flew off, and {he} [did not care|let it fly].",
              "Then the wind turned and brought a smell along. {Hero} [sniffed|stopped]. [Fresh "
              "bread|Onion soup|Wood smoke]! That was {his} own [kitchen|supper], no doubt about "
              "it, and {he} followed {his} nose [down the last stretch|to the very door]."],
        home=["{His} {elder} stood at the door with a [lantern|ladle] and [could not say a "
              "word|hugged {him} until {he} squeaked]. \"[I came as fast as I could|I am so "
              "hungry|What a day it was|I know the way now|You left the lamp burning],\" said "
              "{hero}.",
              "\"There you are!\" {cried} {his} {elder}. \"[We looked everywhere|I kept the soup "
              "warm].\" Nothing had ever tasted as good as that supper."]),
    "promise": dict(
        facts=[dict(thing="a [sealed|thick] letter", obj="letter",
                    why="there was a [wedding invitation|long-awaited answer] inside"),
               dict(thing="a basket of [seedlings|strawberries]", obj="basket",
                    why="there was nothing fresh to eat up there"),
               dict(thing="a [clay|blue] jar of [ointment|honey]", obj="jar",
                    why="nobody else knew the recipe"),
               dict(thing="a [striped|woollen] blanket", obj="blanket",
                    why="the nights were getting cold"),
               dict(thing="a [mended|freshly tuned] fiddle", obj="fiddle",
                    why="there was to be dancing")],
        trouble=["{Hero} had given {his} word: before [the moon was full|the week was out|Sunday], "
                 "{he} would bring {thing} to the old [hermit|widow|watchman] at {spot}, because "
                 "{why}. {day}, {he} [saw with a start|noticed] that it was the last day.",
                 "\"[Can I rely on you|Do you promise]?\" {his} {elder} had asked. \"I promise,\" "
                 "{hero} had [answered|replied]. So one {time}, it was time to bring {thing} to "
                 "the old [watchman|widow|hermit] at {spot}, for {why}."],
        goal=["There was {spot} at last! {Hero} [knocked|called], and [slowly|with a creak] a door "
              "opened. \"You came,\" said a [thin|deep] voice. \"In this [world people forget|day "
              "and age so many forget].\" \"A promise is a promise,\" {said} {hero} and handed "
              "over the {obj}.",
              "The sun was just going down when {hero} set the {obj} down at {spot}. \"[Just in "
              "time|Not a minute too late]!\" {said} the old one there and [served hot soup|poured "
              "out two cups of cocoa|laughed with a toothless mouth]."],
        home=["{Hero} got {dish} for {his} trouble and a {token} as a keepsake. But best of all "
              "was [the way {his} {elder} looked at {him}|that the promise was kept].",
              "{His} {elder} asked only one thing: \"Did you keep your word?\" {Hero} nodded, and "
              "{e_he} [laid a hand on {his} shoulder|was {glad}].",
              "From then on, whenever there was something [important|precious] to be brought "
              "somewhere, people said: \"Give it to {hero}. {He} keeps {his} word.\""]),
    "gift": dict(
        facts=[dict(thing="[a smooth white pebble|a {colour} pebble]", obj="pebble",
                    make="a necklace"),
               dict(thing="[willow wood|a piece of pear wood]", obj="wood", make="a music box"),
               dict(thing="[blue clay|fine red clay]", obj="clay", make="a teapot"),
               dict(thing="[soft white wool|wool as soft as clouds]", obj="wool", make="a shawl"),
               dict(thing="[sweet-smelling beeswax|yellow wax]", obj="wax",
                    make="a candle in the shape of a star")],
        trouble=["{day}, {hero} remembered that {his} {elder} had a birthday on "
                 "[Saturday|Sunday|the first of the month]. A present had to be found, and {he} "
                 "had not [a penny|a single coin]. \"I will make {make},\" {he} {said}. But for "
                 "that {he} needed {thing}, and it was to be found only at {spot}.",
                 "{His} {elder} had [done so much for {him}|not smiled for a long time|always "
                 "given and never got anything]. {day}, {hero} had an idea: {he} would make "
                 "{e_him} {make}! All that was missing was {thing}, and for that {he} had to go to "
                 "{spot}."],
        goal=["At {spot} {hero} found just what {he} was looking for, and {he} [carried|took] it "
              "home under {his} [coat|arm]. For three evenings {he} worked in secret. {He} [cut "
              "{his} thumb|made a mess|spoiled the first try] and began again, and then, out of "
              "the {obj}, there was {make}, [not quite straight|a little lopsided], but {fine}.",
              "{Soon} {he} reached {spot} and found the {obj} [lying there as if it had "
              "waited|between roots and stones]. Then {he} [worked|shaped and rubbed and pressed] "
              "until {his} fingers hurt. On the [third|fourth] morning {make} stood on the table."],
        home=["There was {dish} on the birthday table, and a {token} from a neighbour. But {his} "
              "{elder} [had eyes only for|would not let go of] what {hero} had made.",
              "\"For me?\" asked {his} {elder}, and [sat down|turned it round and round]. \"You "
              "made this yourself?\" {Hero} nodded. It was the [best|finest] present {e_he} ever "
              "got.",
              "{His} {elder} [untied the string|opened the paper] very slowly. Then {e_he} took "
              "{hero} in {e_his} arms, and for a long time nobody [said anything|spoke]."]),
    "stray": dict(
        facts=[dict(obj="lamb", cry="bleat"), dict(obj="duckling", cry="peep"),
               dict(obj="puppy", cry="whimper"), dict(obj="kitten", cry="mew"),
               dict(obj="foal", cry="whinny")],
        trouble=["{day}, the smallest {obj} in {here} was missing. [The door stood open|The little "
                 "basket was empty|There was only a hollow in the straw]. {Folk} [called|searched] "
                 "until they were hoarse and then went [home|to bed]. \"It is out there all "
                 "alone,\" {said} {hero}. \"I am going to look for it.\"",
                 "{Hero} had to look after a {obj}, [{colour} ribbon and all|no bigger than a loaf "
                 "of bread|which loved to run away]. {day}, {he} turned round for one moment, and "
                 "it had [slipped away|vanished]. Small tracks led off in the direction of {spot}. "
                 "{Hero} was {sad}, but there was no time for [weeping|sulking]."],
        goal=["Close to {spot} {he} heard a [faint|tiny] {cry}. {heart}. There, [under a "
              "bush|caught in a bramble|between two stones], sat the {obj} and "
              "[shivered|trembled]. \"[There you are|All is well now],\" [whispered|said] {hero} "
              "and [held it close|stroked its ears].",
              "And who sat at {spot}, [wet|dirty] and [hungry|tired], as if it had been waiting? "
              "The {obj}! With a loud {cry} it [stumbled|tumbled] towards {hero} and "
              "[licked|nuzzled] {his} hand."],
        home=["{Folk} gave {hero} a {token}, and the {obj} gave {him} [a wet kiss|a nudge in the "
              "ribs]. {He} could not say which {he} liked better.",
              "The {obj} slept [beside {hero}|with its head on {hero}'s feet] that night, and from "
              "then on it followed {him} [everywhere|like a shadow].",
              "When {he} brought the {obj} back, {folk} came out with [lamps|warm milk] and wanted "
              "to [carry {him} on their shoulders|shake {his} hand]."]),
}

# --------------------------------------------------------------------------------------------------
# Plots that stay in one place
# attempt: how it goes wrong; ways: how a hero of each trait does it; home: how it ends.

STAYING = {
    "skill": dict(
        facts=[dict(skill="play the fiddle", fail="it squeaked like a [rusty gate|pig at the fair]",
                    good="the tune [danced|flew] through {here}"),
               dict(skill="bake bread",
                    fail="the loaf came out as [hard as a brick|flat as a slipper]",
                    good="the crust [crackled|shone] and the crumb was soft"),
               dict(skill="juggle", fail="the [balls|plums] fell on {his} [head|toes]",
                    good="five balls went round in the air like [swallows|planets]"),
               dict(skill="whistle with two fingers", fail="only [air|spit] came out",
                    good="it rang out so [clear|loud] that even the dogs [sat down|looked up]"),
               dict(skill="walk on stilts", fail="{he} fell into the [nettles|cabbages]",
                    good="{he} [strode|stalked] along above all the fences like a [stork|giant]"),
               dict(skill="weave cloth", fail="the threads [tangled|snapped]",
                    good="a cloth grew on the loom, {colour} and [smooth|even]"),
               dict(skill="skip stones", fail="every stone went [plop|straight down]",
                    good="the stone skipped [nine|eleven] times over the water")],
        trouble=["{day}, {hero} saw {a_helper} {skill} at the fair, and [{he} forgot everything "
                 "else|it was like magic]. \"I want to {skill} too,\" {he} {said}. \"[Nothing "
                 "else|That, and only that]!\"",
                 "More than anything {hero} wanted to {skill}. {He} had [dreamed of it for "
                 "years|never told anyone]. {day}, {he} took heart and went to {a_helper} who "
                 "could do it better than anyone."],
        attempt=["{Hero} borrowed what {he} needed and set to work. But {fail}, and a {manner} "
                 "{beast} [fled|looked away].",
                 "At the first try {fail}, and at the second it was [no better|even worse]. {Folk} "
                 "[giggled|held their ears|hid their smiles]. {Hero} was {sad}.",
                 "It looked [so easy|like child's play]! Yet when {hero} tried it, {fail}. \"[I "
                 "will never learn it|I have two left hands],\" {he} {said}."],
        ways={"brave": "So {hero} stood in the middle of [the road|everything] and practised where "
                       "everybody could see it. {He} [failed|went wrong] and laughed about it "
                       "[louder than the others|first], and each day there was less to laugh "
                       "about.",
              "clever": "So {hero} cut the hard thing into small pieces, as one cuts [a cake|a "
                        "sausage], and learned one piece [each day|at a time]. Then {he} put them "
                        "all together [like a puzzle|in a row].",
              "shy": "So {hero} practised [before sunrise|behind the woodshed], where only [the "
                     "sparrows|a toad and two snails] could see {him}. Nobody [laughed|stared], "
                     "and [little by little|day by day] it went better.",
              "patient": "So {hero} began again. [Ten times, a hundred times, a thousand times|In "
                         "the morning, at noon and in the evening] {he} tried, and never "
                         "[swore|threw anything down]. Every day it was [a hair|a crumb] better.",
              "kind": "A little neighbour wanted to learn it as well and [cried|sulked] when it "
                      "did not work. So {hero} [comforted|encouraged] the child and showed it "
                      "everything slowly, and while {he} was teaching, {he} learned it {himself}.",
              "curious": "So {hero} tried [everything|all there was to try]: fast and slow, left "
                         "and right, [standing on one leg|with closed eyes]. {He} wanted to know "
                         "why it went wrong, and when {he} knew that, {he} also knew how it went "
                         "right."},
        home=["A {manner} {beast} was the first to hear of it, for {hero} was alone when {good}. "
              "After that {he} had to show it to [everyone|all {folk}] [twice|before breakfast].",
              "On the day of the [fair|feast|market] {hero} stood before {folk}. {heart}. Then "
              "{he} began, and {good}. How they [cheered|clapped]!",
              "And one [Friday|Sunday], when nobody expected it, it worked: {good}. {Hero} [stood "
              "open-mouthed|could hardly believe it]."]),
    "contest": dict(
        facts=[dict(what="the great kite contest", item="kite", bad="the frame [snapped|broke]",
                    good="flew [higher than the tallest tree|up to the clouds]"),
               dict(what="the lantern contest", item="lantern", bad="the paper [tore|caught fire]",
                    good="glowed [{colour} and gold|like a small moon]"),
               dict(what="the soapbox race", item="cart", bad="a wheel [came off|rolled away]",
                    good="[shot|thundered] across the line"),
               dict(what="the cake contest", item="cake",
                    bad="it [sank in the middle|burned black]",
                    good="smelled of [cinnamon|lemons|almonds] and melted on the tongue"),
               dict(what="the hat parade", item="hat", bad="the brim [came apart|drooped]",
                    good="nodded with [feathers|cherries] and made everyone smile"),
               dict(what="the pumpkin show", item="pumpkin",
                    bad="the leaves [withered|turned yellow]",
                    good="was as round as [a drum|the sun]")],
        trouble=["Every year {what} was held in {here}, and the prize was [a goblet|a medal|a sack "
                 "of sugar|a silver spoon]. {day}, {hero} [wrote {his} name on the list|put up "
                 "{his} hand]. \"This year I am taking part,\" {he} {said}.",
                 "{day}, a [drummer|messenger|big poster] announced {what}. Everyone [rushed|set] "
                 "to work, and {hero} too wanted to show what {he} could do, even if {he} had "
                 "never [made a {item}|tried anything of the kind]."],
        attempt=["{Hero} had thought of everything, even of a {colour} ribbon. What {he} had not "
                 "thought of was this: {bad}. {He} was {sad}.",
                 "Three days before the contest, however, {bad}, and all the work had been for "
                 "nothing. {Hero} sat down [on {seat}|on the ground], {sad}, and did not [touch "
                 "{his} supper|say a word].",
                 "{He} worked from morning till night. Then, with only two days to go, {bad}. "
                 "\"[That was that|Now it is all over],\" {hero} {said}, and a [tear|sigh] got "
                 "away from {him}."],
        ways={"brave": "{Hero} wiped {his} eyes and [rolled up {his} sleeves|set {his} jaw]. {He} "
                       "made a new {item}, bigger and bolder than the first, such as nobody had "
                       "dared to [make|try] before.",
              "clever": "{Hero} took a [pencil|piece of charcoal] and drew the {item} from all "
                        "sides. Where had the mistake been? There! {He} changed one small thing, "
                        "and the new one was [better|twice as good].",
              "shy": "{Hero} did not ask anybody, but {he} watched how the old masters did it, "
                     "their [hands|fingers], their [little tricks|way of measuring]. Then {he} "
                     "went home and quietly made a new {item}.",
              "patient": "{Hero} cleared away the [bits|ruins] and began again from the start. "
                         "{He} left out nothing and hurried nothing, and an hour before the "
                         "contest the new {item} was [finished|ready].",
              "kind": "Then {he} saw that a rival was in even worse trouble, and {hero} "
                      "[lent|gave] what was missing. In return the rival [stayed|came] all night "
                      "and helped with a new {item}.",
              "curious": "{Hero} wanted to know why it had happened and took [everything|the poor "
                         "thing] apart. What {he} found out {he} tried out at once, and the new "
                         "{item} was like no other [in the land|before it]."},
        home=["{Folk} came in their best {colour} clothes. {Hero}'s {item} {good}, and there was a "
              "prize that [nobody had won before|had never been given to anyone so modest]: a "
              "{token}.",
              "The great day came, and {hero}'s {item} {good}. {He} did not win the first prize "
              "but the [second|third], and {he} was as proud as [a peacock|a king].",
              "Then came the day of {what}. {heart}. And see there: {hero}'s {item} {good}! The "
              "judges [put their heads together|threw up their hats], and the prize went to "
              "{hero}."]),
    "fix": dict(
        facts=[dict(item="bell", where_is="the big bell of {here}", still="did not ring any more",
                    again="rang over all the roofs"),
               dict(item="clock", where_is="the tall clock of {here}",
                    still="stood still at [ten past four|half past nine]",
                    again="ticked and struck the hour"),
               dict(item="pump", where_is="the only pump in {here}",
                    still="gave no [water|drop of water]",
                    again="gurgled, spat and gave clear water"),
               dict(item="merry-go-round", where_is="the old merry-go-round",
                    still="would not turn",
                    again="turned, and the painted horses [nodded|galloped]"),
               dict(item="barrel organ", where_is="the barrel organ for the feast",
                    still="made no sound",
                    again="played a [waltz|polka] without a single wrong note"),
               dict(item="stove", where_is="the great stove in the hall", still="only smoked",
                    again="[crackled|hummed] and warmed everyone")],
        trouble=["{day}, something was wrong: {where_is} {still}. {Folk} [scratched their "
                 "heads|stood around it|argued]. \"[It is too old|It is done for],\" they said. "
                 "\"We need a new one, and [who is to pay for that|where is the money to come "
                 "from]?\"",
                 "{Folk} were proud of one thing: {where_is}. But one {time}, it {still}. [An "
                 "expert|Somebody important] came, [tapped|looked] at it and went away again. "
                 "\"[Nothing to be done|Scrap metal],\" he said. \"Let me try,\" {said} {hero}."],
        attempt=["{Hero} asked for a ladder, a lamp and a {token}. By noon {he} knew a great deal "
                 "about the {item}, but it [did not move|was as broken as before], and {he} was "
                 "{sad}.",
                 "{He} [pushed and pulled|knocked and shook|oiled and rubbed], but the {item} [did "
                 "not stir|gave only a groan]. {His} [sleeves|fingers] were black, and {he} was "
                 "{sad}.",
                 "At first {he} only made it worse: [a screw|a spring|a bolt] jumped out and "
                 "[rolled out of sight|hit {his} nose]. {Hero} [sat down on {seat}|bit {his} "
                 "lip]."],
        ways={"brave": "Then {hero} did what nobody had dared: {he} [crawled|squeezed] right "
                       "inside, where it was dark and [narrow|full of spiders]. Far at the back a "
                       "stone was stuck. {He} pulled it out with both hands.",
              "clever": "Then {hero} had an idea. With a [spoon|hairpin], a [bit of wire|bootlace] "
                        "and [a cork|half a walnut shell] {he} made a new part for the one that "
                        "was [worn out|broken].",
              "shy": "Then {hero} laid {his} ear against the {item} and kept quite still. There "
                     "was a tiny [scraping|click] deep inside that no one else had heard, and so "
                     "{he} knew where the [fault|trouble] lay.",
              "patient": "Then {hero} took the {item} apart and laid the pieces on a cloth, one "
                         "beside the other. {He} cleaned each of them, the [smallest|last] too, "
                         "and put [them all|everything] back in its order.",
              "kind": "Then {hero} saw a [wren|mouse] that had built its nest inside. Others would "
                      "have [torn it out|thrown it away]. {He} carried the nest carefully to a "
                      "[warmer|safer] place, and where it had been, nothing was jammed any more.",
              "curious": "Then {hero} asked of each part what it was for. This one [turned that "
                         "one|pushed the next], that one held this one. Only one hook held "
                         "nothing. \"What is missing here?\" {he} asked, and found the [pin|chain] "
                         "on the ground."},
        home=["[For a moment all was still|{Hero} crossed {his} fingers]. Then, with a jerk, the "
              "{item} {again}. There was {dish} for everybody, and {hero} got the [first|biggest] "
              "plate.",
              "{heart}. {He} tried it once more, and the {item} {again}! {Folk} came running [in "
              "their slippers|with flour on their hands|from all sides].",
              "And then the {item} {again}, as if it had never done anything else. \"[Three cheers "
              "for {hero}|Long live {hero}]!\" {cried} {folk}."]),
    "fear": dict(
        facts=[dict(fear="the dark", cure="in the [black|pitch-dark] cellar", who="kitten"),
               dict(fear="thunder", cure="out in the [storm|thunderstorm]", who="lamb"),
               dict(fear="heights", cure="high up on a [roof|ledge]", who="kitten"),
               dict(fear="big dogs", cure="behind the watchdog's [kennel|yard]", who="chick"),
               dict(fear="the empty house on the corner", cure="inside the empty house",
                    who="puppy"),
               dict(fear="the old well", cure="on the rim of the old well", who="goat")],
        trouble=["There was only one thing that {hero} could not bear, and that was {fear}. {He} "
                 "[told no one|was ashamed of it]. {day}, {he} heard a thin cry. A little {who} "
                 "was stuck {cure}, and nobody else was [there|at home].",
                 "{Hero} was afraid of {fear}. [Everyone has something|It had always been so]: "
                 "{his} knees became [soft as butter|like jelly] at the mere thought. {day}, a "
                 "little {who} got lost, and where did it cry for help? It was {cure}, of all "
                 "places."],
        attempt=["{Hero} went three steps, [turned round|stopped] and ran back. {He} tried it "
                 "[again|with eyes shut], and ran back again. {He} was {sad} and [angry with "
                 "{himself}|ashamed].",
                 "\"[Somebody must help|Somebody has to go there],\" {hero} {said}, but there was "
                 "nobody but {him}. {He} [trembled|shook], {his} mouth was dry, and {his} feet "
                 "would not [move|obey]."],
        ways={"brave": "\"I am afraid,\" {said} {hero} aloud, \"and I am going all the same.\" And "
                       "{he} went, with [shaking|wobbly] knees, one step and then another, and "
                       "reached the {who}.",
              "clever": "{Hero} made a plan. {He} would think only of the next step and count: "
                        "[one, two, three|by sevens]. With {his} head so full of numbers, the fear "
                        "[had no room|found no place], and at [forty|fifty] {he} reached the "
                        "{who}.",
              "shy": "{Hero} listened closely to {his} fear. What was it really like? It was "
                     "[small|quite small] and talked too [much|fast]. \"Hush,\" {he} said to it, "
                     "and walked on softly until {he} reached the {who}.",
              "patient": "{Hero} took it slowly. One step, and wait until {his} heart was calm. "
                         "One more step, and wait. It lasted [very long|half an eternity], but "
                         "{he} reached the {who}.",
              "kind": "But the {who} was [crying|calling] so sadly. \"It is even more afraid than "
                      "I am,\" {hero} thought, and with that {he} was already on {his} way and "
                      "[sang to it|talked to it softly] until {he} reached it.",
              "curious": "What exactly was so [terrible|bad] about it? {Hero} wanted to know now. "
                         "{He} looked at {fear} as if for the first time, and the closer {he} "
                         "looked, the [smaller|weaker] the fear became, until {he} reached the "
                         "{who}."},
        home=["The little {who} did not say thank you, for it was [too young|already asleep]. But "
              "{hero} looked back once more at {fear} and [waved|smiled].",
              "{He} led the {who} out, step by step. Was {he} still afraid? [A little|A bit], yes. "
              "But now the fear was [no bigger than a pea|only a small one], and {hero} had grown "
              "[much|a good deal] bigger.",
              "The {who} [snuggled up to {him}|licked {his} nose] and fell asleep. And {hero} "
              "noticed with surprise that {he} had stopped trembling [long ago|a while before]."]),
    "friend": dict(
        facts=[dict(alone="{he} never knew how to begin"),
               dict(alone="the others only played [catch|marbles|leapfrog] and never noticed "
                          "{him}"),
               dict(alone="everyone there was [much older|busy from morning till night]"),
               dict(alone="{his} last friend had moved [over the border|far away]")],
        trouble=["{Hero} had no friend, for {alone}. {day}, somebody new came to {here}: {friend} "
                 "{the_friend}, with [a trunk|a bird cage|a trumpet case] and a [cross|wary|stony] "
                 "face. \"Perhaps this is a friend for me,\" thought {hero}.",
                 "{day}, [a cart stopped|there was a light in a window that had long been dark]. "
                 "{Friend} {the_friend} had moved to {here}. {Hero} was {glad}, for {he} was often "
                 "lonely: {alone}."],
        attempt=["\"Good day,\" {hero} {said}. \"Leave me alone,\" growled {friend} and [slammed "
                 "the door|turned {f_his} back]. {Hero} [walked home slowly|did not know what to "
                 "say] and was {sad}.",
                 "But {friend} talked to nobody. When {hero} brought {food} as a welcome, {f_he} "
                 "[left it lying|pretended to be out]. \"[What have I done wrong|Does nobody like "
                 "me]?\" {he} {asked}."],
        ways={"brave": "So {hero} knocked [a second time|again]. \"I am lonely,\" {he} said "
                       "straight out, \"and I think you are too.\" That was hard to say. {Friend} "
                       "[stared|opened the door a crack]. \"How do you know that?\" {f_he} asked.",
              "clever": "So {hero} built a telephone out of two [tins|cups] and a long string, and "
                        "laid one end on {friend}'s windowsill. [On the second evening|After an "
                        "hour] there was a crackling. \"Hello?\" said {friend}'s voice.",
              "shy": "So {hero} sat down on {friend}'s steps, [not too near|at the far end], and "
                     "said nothing. The next day {he} did it again. On the third day {friend} sat "
                     "down beside {him}. \"You are nice and quiet,\" {f_he} said. \"[That is "
                     "rare|I like that|Stay a while|Do you want a plum].\"",
              "patient": "So {hero} said good day [each morning|every single day] and expected "
                         "nothing. After [a week|nine days] {friend} nodded. After [two weeks|a "
                         "month] {f_he} said: \"Good day, {hero}. Will you come in?\"",
              "kind": "So {hero} thought about what {friend} might be missing. It was "
                      "[cold|draughty] in {f_his} house, so {he} left [firewood|a woollen blanket] "
                      "at the door, with a [flower|note] on top. That evening {friend} came over. "
                      "\"Was that you?\" {f_he} asked, with a red nose.",
              "curious": "So {hero} asked about the thing {friend} had brought along. What was it? "
                         "How did it work? {Friend} [forgot to be cross|began to explain], [first "
                         "in one word|slowly at first], then without stopping until supper."},
        home=["\"[Do you like {dish}|Can you keep a secret]?\" asked {friend} one day. {Hero} did, "
              "and that was the beginning of a friendship that [lasted all their lives|nothing "
              "could end].",
              "It turned out that {friend} was only homesick. {Hero} showed {f_him} [the best "
              "hiding places|where the blackberries grew|the view from the hill], and [soon they "
              "were inseparable|from that day there were two of them].",
              "From then on they met every day. They built [a raft|a tree house|a snail zoo], "
              "quarrelled [twice|now and then] and made it up again, as friends do."]),
    "mystery": dict(
        facts=[dict(odd="[buns|pies] disappeared from the windowsills", who="dormouse",
                    why="was storing food for the winter"),
               dict(odd="a [moaning|howling] was heard in the night", who="young owl",
                    why="had caught one wing in a pipe"),
               dict(odd="[socks|mittens] disappeared from the washing lines", who="mother cat",
                    why="was padding a bed for her kittens"),
               dict(odd="somebody [rang a little bell|tapped on the shutters] at midnight",
                    who="lost goat", why="was looking for company"),
               dict(odd="shiny [buttons|spoons] were missing everywhere", who="jackdaw",
                    why="wanted to decorate its nest"),
               dict(odd="a [blue|strange] light wandered along the walls at night",
                    who="sleepwalker", why="always took a lantern along")],
        trouble=["{day}, it began: {odd}. {Folk} [bolted their doors|whispered|looked over their "
                 "shoulders]. \"[It is a ghost|It is a thief]!\" said some. \"[A troll|A "
                 "goblin]!\" said others. \"I am going to find out,\" {said} {hero}.",
                 "There was a riddle in {here}: {odd}. Nobody knew [how|why]. {day}, {hero} had "
                 "heard enough [rumours|nonsense]. \"There is a reason for everything,\" {he} "
                 "{said}, \"and I shall find it.\""],
        attempt=["The first night {he} [fell asleep at {his} post|sat up in vain], and in the "
                 "morning there was [nothing but a feather|only a smudge]. \"[Told you so|A ghost "
                 "leaves no tracks],\" people said. {Hero} was {sad}.",
                 "{He} [strewed flour on the ground|hung up tin cans on a string], but it "
                 "[rained|was windy], and in the morning {he} was no wiser. Some people laughed at "
                 "{him}."],
        ways={"brave": "The next night {hero} went out without a [lamp|stick], straight to where "
                       "it was [darkest|most eerie]. \"Who is there?\" {he} called, and did not "
                       "run when something moved.",
              "clever": "Then {hero} drew a map and made a cross wherever something had happened. "
                        "The crosses made a [circle|ring], and in the middle of it was [an old "
                        "shed|a woodpile]. There {he} went at nightfall.",
              "shy": "Then {hero} did what {he} did best: {he} made {himself} small, sat in a "
                     "corner and listened, hour after hour, to [every creak|the least sound]. And "
                     "there it was, a [rustle|patter] behind the boards.",
              "patient": "{Hero} kept watch a second night, and a third, and a fourth. The others "
                         "had long [gone to sleep|lost interest]. On the fifth night, [just before "
                         "dawn|towards morning], something stirred.",
              "kind": "\"Perhaps it is somebody who needs something,\" thought {hero}, and in the "
                      "evening {he} put out [a bowl of milk|bread and a blanket]. Then {he} sat "
                      "down beside it and waited, and something came closer.",
              "curious": "{Hero} took a [magnifying glass|candle end] and looked at what nobody "
                         "looks at: [the dust|the gutter], [the scratches on the wood|the crumbs]. "
                         "One trace led to the next, and the last one led behind the woodshed."},
        home=["A {who}! It {why}, and that was the whole secret. {Hero} promised to help, and "
              "{folk} [slept well again|laughed about it for weeks].",
              "And what was it? No ghost, but a {who} that {why}! [Nobody was angry|Everyone had "
              "to laugh], and {folk} brought what was needed.",
              "{Hero} had found no thief and no troll, only a {who} that {why}. \"[So that is "
              "it|Well, well],\" {said} {hero}. {Folk} [came to help|were ashamed], and the riddle "
              "was solved."]),
}
QUIET = [
    "{He} liked [the smell of rain|old songs|warm socks|the first snow|long breakfasts], and {he} "
    "did not like [cold porridge|hurrying|scratchy collars|goodbyes].",
    "{He} got up [with the sun|before the cock crowed], swept the floor and [fed the birds|watered "
    "the beans|put the kettle on], and so the days went by, [one like the other|calm and even].",
]

# --------------------------------------------------------------------------------------------------
# The story


def draw_facts(teller: Teller) -> None:
    """Draws hero, trait and place into the teller's facts, and puts there how the rest is drawn."""
    facts, fill, pick = teller.facts, teller.fill, teller.pick
    place, trait = pick(PLACES), pick(list(TRAITS))
    age, she = pick(["child", "child", "beast", "beast", "old"]), teller.chance(0.5)
    hero, kind, look, elders, friends, friend_from, kinds = draw_hero(teller, place, age, she)
    other = HE if she else SHE  # of friend, elder and helper, so that "he" and "she" stay clear
    birds = "goose gander swan turkey rooster parrot snow ostrich".split()
    slot, fresh = teller.slot, teller.fresh
    facts.update(SHE if she else HE, trait=trait, hero=hero, a_hero=f"a {look} {kind}",
                 here=place["here"], folk=place["folk"])
    facts.update({f"{who}_{word}": other[word] for who in "efh" for word in ("he", "him", "his")})
    facts.update(  # drawn when first used, if at all
        elder=lambda: pick(elders), friend=lambda: pick(friends),
        the_friend=lambda: friend_from + pick(kinds),
        helper=lambda: pick(OLD_MEN if she else OLD_WOMEN),
        a_helper=lambda: "a " + slot("helper_kind"),
        the_helper=lambda: "the " + slot("helper_kind"),
        helper_kind=lambda: pick([h for h in place["helpers"] if h not in kind]),
        a_guard=lambda: "a " + slot("guard"),
        the_guard=lambda: "the " + re.sub(" with.*", "", slot("guard")),
        guard=lambda: pick([g for g in place["guard"]
                            if g.split()[0] not in kind and kind.split()[-1] not in g]),
        g_said=lambda: pick("hissed snapped screeched".split() if slot("guard").split()[0] in birds
                            else "growled grunted snapped snorted".split()),
        spot=lambda: fresh(place["spots"]), spot2=lambda: fresh(place["spots"]),
        seat=lambda: fresh(place["seat"]), seat2=lambda: fresh(place["seat"]),
        time=lambda: pick(place["times"]), day=lambda: fill(pick(DAYS)),
        advice=lambda: fill(pick(ADVICE[trait])), block=lambda: pick(place["blocks"]),
        bag=lambda: pick(BAGS), home=lambda: fill(place["den" if age == "beast" else "home"]))
    for key in ("where", "way", "murk", "dark", "land"):
        facts[key] = lambda key=key: fill(place[key])


def draw_hero(teller: Teller, place: dict, age: str, she: bool) -> tuple:
    """The hero's name, kind and look; the elders, friends and friends' kinds to draw from later.

    Before those kinds stands what connects them with the friend's name.
    """
    pick, friends, friend_from = teller.pick, (BOYS if she else GIRLS), "the "
    elders = ["father", "grandfather", "uncle"] if she else ["mother", "grandmother", "aunt"]
    if age == "beast":
        kind, hero = pick(place["animals"]), pick(BEASTS)
        kinds = [k for k in place["animals"] if k != kind]
        friends = [n for n in BEASTS if n != hero]
        look = pick("young small plump nimble scruffy slender".split())
    elif age == "child":
        trade = pick(["", *TRADES])
        kind = f"{trade}'s {'daughter' if she else 'son'}" if trade else "girl" if she else "boy"
        hero = pick(GIRLS if she else BOYS)
        kinds = [f"{t}'s {'son' if she else 'daughter'}" for t in TRADES if t != trade]
        look = pick("young small freckled tall curly-haired barefoot".split())
    else:
        kind, hero = pick(OLD_TRADES), pick(OLD_WOMEN if she else OLD_MEN)
        look = pick("old white-haired small rosy-cheeked lean stooped".split())
        kinds, friend_from = ["next door", "the corner house", "over the way"], "from "
        elders = ["brother" if she else "sister", "cousin", "neighbour"]
    return hero, kind, look, elders, friends, friend_from, kinds


def meeting(teller: Teller, *where: list) -> list[str]:
    """The helper comes, asks and gives advice."""
    return [teller.say(*options) for options in (*where, GREET, COUNSEL)]


def ending(teller: Teller, helped: bool, doubt: bool) -> list[str]:
    """What is still owed to the helper and to the friend who doubted."""
    thanks = [teller.say(*THANKS)] if helped and teller.chance(0.6) else []
    return thanks + ([teller.say(*DOUBT_END)] if doubt else [])


def size(parts: list) -> int:
    return sum(len(text.split()) for texts in parts for text in texts)


def journey(teller: Teller, plot: dict, helped: bool) -> list[list[str]]:
    """Trouble, farewell, the way with its obstacle and perhaps a helper; the goal; coming home."""
    say, slot = teller.say, teller.slot
    lost = "how" in teller.facts  # the hero is far from home already: nobody to say farewell to
    doubt = not lost and not helped and teller.chance(0.25)
    trouble = [say(*plot["trouble"])]
    if doubt or not lost and teller.chance(0.1 if helped else 0.3):
        trouble.append(say(*(DOUBT if doubt else TALK)))
    start = [say(*DAYBREAK)] if re.search("night|evening", slot("time")) and not lost else []
    start += [say(*GO)] + ([say(*SIGHTS)] if not helped and teller.chance(0.3) else [])
    middle = [[say(*BLOCKS[slot("block")]), say(WAYS[slot("block")][slot("trait")])]]
    if helped:
        middle.insert(teller.pick([0, 1]), meeting(teller, MEET))
    goal, home = [say(*plot["goal"])], [say(*plot["home"])]
    return [trouble, start + middle[0], *middle[1:], goal, home + ending(teller, helped, doubt)]


def staying(teller: Teller, plot: dict, helped: bool, name: str) -> list[list[str]]:
    """Trouble, a first attempt that fails, perhaps good advice, the hero's own way of doing it."""
    facts, say = teller.facts, teller.say
    doubt = name != "friend" and not helped and teller.chance(0.3)
    trouble = [say(*plot["trouble"])] + ([say(*DOUBT)] if doubt else [])
    attempt = [say(*plot["attempt"])]
    attempt += [say(*PAUSES)] if not helped and teller.chance(0.3) else []
    way = [say(plot["ways"][facts["trait"]]), say(*plot["home"])]
    if not helped:
        return [trouble, attempt, way, ending(teller, helped, doubt)]
    advice = meeting(teller, *([] if name == "skill" else [MEET_HERE]))
    return [trouble + attempt, advice, way, ending(teller, helped, doubt)]


def story(rng: random.Random) -> tuple[str, float]:
    """One story, four to seven paragraphs, and the bits of the choices that made it."""
    teller = Teller(rng)
    say, facts = teller.say, teller.facts
    draw_facts(teller)
    name = teller.pick([n for n in (*JOURNEYS, *STAYING)
                        if n != "home" or facts["here"] != "the city"])
    plot = {**JOURNEYS, **STAYING}[name]
    for key, value in teller.pick(plot["facts"]).items():
        facts[key] = lambda value=value: teller.fill(value)
    opening = [say(*(ONCE if teller.chance(0.5) else OTHER)), say(*TRAITS[facts["trait"]])]
    helped = name == "skill" or teller.chance(0.53)
    parts = [opening, *(journey(teller, plot, helped) if name in JOURNEYS else
                        staying(teller, plot, helped, name))]
    for options, p, place, after in ((HOMES, 0.2, 0, 1), (FEEL, 0.15, -1, 0), (LAST, 0.6, -1, 9)):
        if size(parts) < 280 and teller.chance(p):
            if options is LAST and teller.chance(0.2):
                options = MORALS[facts["trait"]]
            parts[place].insert(after, say(*options))
    while size(parts) < 152:  # a little more about the hero
        parts[0].append(say(*QUIET))
    return polish("\n".join(" ".join(texts) for texts in parts if texts)), teller.bits


def main(arguments: list[str]) -> None:
    numbers = [int(a) for a in arguments if a.isdigit()]
    rng = random.Random(numbers[1] if len(numbers) > 1 else 0)
    if "--stats" not in arguments:
        print("\n\n".join(story(rng)[0] for _ in range(numbers[0] if numbers else 5)))
        return
    stories = [story(rng) for _ in range(3000)]
    sizes = [len(text.split()) for text, _ in stories]
    words = {word for text, _ in stories
             for word in re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())}
    print(f"{len(words)} distinct words; words a story: mean {sum(sizes) / len(sizes):.1f}, min "
          f"{min(sizes)}, max {max(sizes)}")
    print(f"{sum(bits for _, bits in stories) / sum(sizes):.3f} bits a word")


if __name__ == "__main__":
    main(sys.argv[1:])
