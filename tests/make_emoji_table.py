"""Make `table.tsv` from Unicode's emoji-test.txt and CLDR's English annotations, and the choices written down here.

Run once, by hand, on a machine with the Debian packages unicode-data and unicode-cldr-core:

    python tests/make_emoji_table.py > ldm/data/emoji/table.tsv

The selection: every fully-qualified line of the five groups below in Emoji 15.0, 849 in all. None of them has a skin
tone; four are ZWJ sequences (service dog, black cat, polar bear, black bird), which are pictures of their own.

Words: what captions may call an object, the commonest first; CLDR's name in lower case is always among them.
Markers: `+word` is a plural name (grapes), `~word` takes no "a" (bread), `^word` is unique (the sun),
`word/plural` gives an irregular plural, `!word` has no plural that sounds right. Rules of choice:
CLDR's own name belongs to its object ("cat" is the whole cat, the head is "cat face"), every other word to the one
object that most people would draw for it; no word belongs to two objects.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

UNICODE = Path("/usr/share/unicode")
GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")

# CLDR 42 has no annotations for the objects that Emoji 15.0 added; these were written by hand.
KEYWORDS = {
    "moose": "antlers|elk|mammal",
    "donkey": "animal|burro|mule",
    "wing": "angel|bird|feathers|flying",
    "black bird": "bird|black|crow|raven",
    "goose": "bird|fowl|honk",
    "jellyfish": "marine|sea|sting|tentacles",
    "hyacinth": "bloom|flower|lavender|purple",
    "ginger root": "ginger|root|spice",
    "pea pod": "legume|pea|peas|vegetable",
    "folding hand fan": "cooling|fan|flutter|paper",
    "hair pick": "afro|comb|hair|pick",
    "maracas": "instrument|music|rattle|shake",
    "flute": "instrument|music|recorder|woodwind",
}

# `*` marks the 150 everyday objects: what people type first.
WORDS = """
*monkey; monkey face; gorilla; orangutan: ape; *dog: puppy, doggy, pup; dog face: dog head; service dog; poodle
wolf/wolves; *fox; raccoon; *cat: kitty, kitten; cat face: cat head; *lion; *tiger; leopard: cheetah, jaguar
moose/moose: elk/elk; donkey: mule; *horse: pony; *unicorn; zebra; deer/deer: fawn; bison/bison: buffalo/buffalo
ox/oxen: bull; water buffalo/water buffalo; *cow; *pig: piglet; boar: wild boar; pig nose: pig snout
ewe= *sheep/sheep, ewe, lamb; camel: dromedary; llama: alpaca; *giraffe; *elephant; rhinoceros= rhino, rhinoceros
hippopotamus= hippo, hippopotamus; mouse/mice; mouse face; rat; *rabbit: bunny, hare; rabbit face: bunny face
chipmunk: squirrel; *bear: brown bear; *panda: panda bear; koala: koala bear; paw prints= +paw prints, +paws
chicken: hen; rooster: cockerel; baby chick: chick; *bird; *penguin; dove: pigeon; eagle: hawk; *duck; swan; *owl
black bird: crow, raven, blackbird; goose/geese; *frog: toad; crocodile: alligator; *turtle: tortoise; *snake: serpent
dragon face: dragon head; *dragon; sauropod= brontosaurus, sauropod; T-Rex= *dinosaur, t-rex, tyrannosaurus, dino
whale; dolphin; *fish/fish: ; tropical fish/tropical fish; blowfish/blowfish: pufferfish/pufferfish; *shark
octopus/octopuses; spiral shell: seashell, shell; coral= ~coral; jellyfish/jellyfish; snail; *butterfly: 
bug: caterpillar; ant; honeybee= *bee, honeybee, honey bee, bumblebee; lady beetle= ladybug, lady beetle, ladybird
cricket: grasshopper; *spider; spider web: cobweb, spiderweb; fly: housefly; worm: earthworm; microbe: germ, bacterium/bacteria
bouquet: bouquet of flowers/bouquets of flowers; *rose: red rose; *sunflower; tulip; blossom= *flower, blossom, daisy
potted plant: houseplant, plant; seedling: sprout; evergreen tree: pine tree, fir tree, pine
deciduous tree= *tree, deciduous tree, oak tree; palm tree: palm; *cactus/cacti; sheaf of rice/sheaves of rice: ; herb
leaf fluttering in wind= leaf/leaves, !leaf fluttering in wind; maple leaf/maple leaves; fallen leaf/fallen leaves
nest with eggs= nest with eggs/nests with eggs; empty nest: nest; four leaf clover: four-leaf clover; *mushroom: toadstool
*grapes= +grapes, !bunch of grapes/bunches of grapes; melon; *watermelon; tangerine= *orange, tangerine, mandarin; *lemon
*banana; *pineapple; mango/mangoes; red apple= *apple, red apple; green apple; pear; peach/peaches; *cherries= +cherries
*strawberry; blueberries= +blueberries; kiwi fruit= kiwi, kiwi fruit/kiwi fruit; *tomato/tomatoes; coconut; avocado
eggplant: aubergine; potato/potatoes; *carrot; ear of corn= *~corn, ear of corn/ears of corn, ~sweetcorn, corn cob
hot pepper: chili pepper, chili, chilli; bell pepper: green pepper; cucumber: pickle; leafy green= ~lettuce, leafy green, cabbage
broccoli= ~broccoli; garlic= ~garlic; onion; peanuts= +peanuts; beans= +beans; ginger root= ginger root, ~ginger
pea pod= pea pod, +peas; *bread= ~bread, loaf of bread/loaves of bread; croissant; baguette bread= baguette, ~baguette bread
flatbread: pita; bagel; pancakes= +pancakes, stack of pancakes/stacks of pancakes; cheese wedge= *~cheese, cheese wedge
meat on bone= ~meat, !meat on bone; poultry leg= chicken leg, poultry leg, drumstick; cut of meat= steak, cut of meat/cuts of meat
bacon= ~bacon; hamburger= *burger, hamburger, cheeseburger; french fries= *+french fries, +fries; *pizza= pizza, slice of pizza/slices of pizza
*hot dog: hotdog; *sandwich/sandwiches; *taco; stuffed flatbread: kebab, gyro; falafel= ~falafel; *egg; cooking= fried egg, frying pan, ~cooking
shallow pan of food= paella, !shallow pan of food; pot of food= stew, pot of food/pots of food; bowl with spoon= bowl, bowl with spoon/bowls with spoons
fondue= ~fondue; green salad= salad, green salad; *popcorn= ~popcorn; butter= ~butter; salt= ~salt, salt shaker; canned food= can, ~canned food
bento box/bento boxes: bento; cooked rice= ~rice, ~cooked rice, bowl of rice/bowls of rice; curry rice= ~curry, ~curry rice
rice ball: onigiri; steaming bowl= ~ramen, steaming bowl, +noodles, bowl of noodles/bowls of noodles; spaghetti= ~spaghetti, ~pasta
oden= ~oden; *sushi= ~sushi; fried shrimp/fried shrimp: tempura shrimp/tempura shrimp; dango= ~dango; dumpling: gyoza/gyoza
fish cake with swirl= fish cake, !fish cake with swirl; moon cake: mooncake; takeout box/takeout boxes: 
*crab; lobster; shrimp/shrimp: prawn; squid/squid; soft ice cream= ice cream cone, soft ice cream; *ice cream: ice cream sundae
doughnut= *donut, doughnut; *cookie: biscuit; birthday cake= *cake, birthday cake; shortcake: slice of cake/slices of cake; cupcake: muffin
pie; chocolate bar= ~chocolate, chocolate bar, bar of chocolate/bars of chocolate; candy= ~candy, sweet; lollipop; custard= pudding, ~custard, flan
honey pot= ~honey, honey pot, honeypot; glass of milk= *~milk, glass of milk/glasses of milk; hot beverage= *~coffee, hot beverage, cup of coffee/cups of coffee, cup
teapot; teacup without handle= ~tea, !teacup without handle, cup of tea/cups of tea; sake= ~sake; bottle with popping cork= ~champagne, !bottle with popping cork, bottle of champagne/bottles of champagne
wine glass= *~wine, wine glass, glass of wine/glasses of wine; cocktail glass= cocktail, cocktail glass, martini; beer mug= *~beer, beer mug, glass of beer/glasses of beer
clinking beer mugs= +clinking beer mugs; clinking glasses= +clinking glasses; tumbler glass= ~whisky, tumbler glass, whiskey, tumbler; tropical drink
cup with straw= soda, cup with straw/cups with straws; bubble tea= ~bubble tea, ~boba; beverage box= juice box, beverage box, carton of juice/cartons of juice
mate= ~mate; ice= ~ice, ice cube; chopsticks= +chopsticks; fork and knife with plate= plate, !fork and knife with plate; fork and knife= ~cutlery, !fork and knife, fork
kitchen knife/kitchen knives: knife/knives; pouring liquid= ~pouring liquid
globe showing Americas= *^earth, globe, !globe showing americas, ^world; globe showing Europe-Africa= !globe showing europe-africa
globe showing Asia-Australia= !globe showing asia-australia; globe with meridians= !globe with meridians; world map: map; map of Japan= !map of japan
snow-capped mountain: snowy mountain; *mountain; *volcano/volcanoes; mount fuji= ~mount fuji; camping= ~camping, campsite; beach with umbrella= beach, !beach with umbrella
desert island: tropical island, island; national park: landscape; classical building: greek temple; building construction= ~building construction, crane, construction crane
brick= brick, brick wall, +bricks; rock: stone, boulder; wood= ~wood, log; houses= +houses; *house: home, cottage; house with garden= house with garden/houses with gardens
office building: building, skyscraper; *castle; wedding= wedding chapel, wedding; Statue of Liberty= ^statue of liberty; *church; hindu temple: temple
shinto shrine: shrine, torii gate; kaaba= ^kaaba; Tokyo tower= ~tokyo tower; tent; foggy= ~foggy, golden gate bridge; night with stars= starry night, !night with stars
cityscape: city; cityscape at dusk= !cityscape at dusk; sunrise over mountains= !sunrise over mountains; bridge at night= bridge, !bridge at night; hot springs= +hot springs
carousel horse: carousel; playground slide: slide; circus tent: circus; locomotive= steam train, locomotive, steam engine; *train; metro: subway; railway car: train car
*bus: ; oncoming bus; fire engine= fire truck, fire engine; police car; *taxi: cab; automobile= *car, automobile; sport utility vehicle= suv, sport utility vehicle
pickup truck: pickup; delivery truck= *truck, delivery truck; articulated lorry: semi truck, lorry; *tractor; racing car: race car; motorcycle= *motorcycle, motorbike
motor scooter: moped, vespa; manual wheelchair: wheelchair; auto rickshaw: tuk tuk; bicycle= *bicycle, bike; kick scooter: scooter; roller skate
motorway: highway, road; railway track: railroad track; oil drum: barrel; fuel pump: gas pump; wheel; police car light: siren; vertical traffic light= traffic light, vertical traffic light
construction= construction barrier, ~construction, barrier; anchor; ring buoy: lifebuoy, life preserver; *sailboat: boat, sailing boat; canoe: kayak; speedboat; passenger ship: cruise ship
motor boat: motorboat; *ship: ; *airplane: plane, aeroplane, jet; airplane departure= ~airplane departure; airplane arrival= ~airplane arrival; *helicopter; mountain cableway: gondola
aerial tramway: cable car; *rocket: spaceship, rocket ship; flying saucer= ufo, flying saucer, alien spaceship; luggage= suitcase, ~luggage; bellhop bell: service bell
hourglass done= !hourglass done; hourglass not done= hourglass, !hourglass not done; watch: wristwatch; alarm clock; three o’clock= *clock, ~three o'clock, wall clock
crescent moon= *moon, crescent moon; *sun= sun, ^sun; ringed planet= planet, ringed planet, ~saturn; *star: yellow star; shooting star: falling star; milky way= ^milky way, galaxy
*cloud; tornado/tornadoes; fog= ~fog; wind face: ; *rainbow; *umbrella; high voltage= *~lightning, ~high voltage, lightning bolt; *snowflake; *snowman/snowmen
snowman without snow= !snowman without snow; *fire= ~fire, flame; droplet= water drop, droplet, raindrop; water wave= wave, water wave, ocean wave; umbrella on ground= beach umbrella, !umbrella on ground
umbrella with rain drops= !umbrella with rain drops; sun behind cloud= !sun behind cloud; sun behind small cloud= !sun behind small cloud; sun behind large cloud= !sun behind large cloud
sun behind rain cloud= !sun behind rain cloud; cloud with rain= rain cloud, !cloud with rain; cloud with snow= snow cloud, !cloud with snow; sun with face= !sun with face
cloud with lightning= storm cloud, !cloud with lightning; cloud with lightning and rain= thunderstorm, !cloud with lightning and rain; closed umbrella
jack-o-lantern= *pumpkin, jack-o-lantern; *Christmas tree: xmas tree; *fireworks= +fireworks; firecracker: stick of dynamite/sticks of dynamite; sparkles= +sparkles; *balloon: red balloon
party popper; confetti ball: ; Japanese dolls= +japanese dolls; ribbon= bow, ribbon; wrapped gift= *gift, wrapped gift, present; reminder ribbon: yellow ribbon
admission tickets= +admission tickets; ticket; sports medal= *medal, sports medal, gold medal; 1st place medal= 1st place medal, first place medal; trophy= *trophy, cup trophy
soccer ball= *soccer ball, football, ball; *baseball; *basketball; *volleyball; american football= *american football; tennis= *tennis racket, ~tennis, racket; flying disc: frisbee
bowling= bowling ball, ~bowling; cricket game= cricket bat, ~cricket game; field hockey= ~field hockey, field hockey stick; ice hockey= ~ice hockey, hockey stick; lacrosse= ~lacrosse, lacrosse stick
ping pong= ping pong paddle, ~ping pong, table tennis paddle; badminton= ~badminton, badminton racket; *boxing glove; martial arts uniform: karate uniform; goal net: soccer goal
flag in hole= golf flag, !flag in hole, ~golf; fishing pole: fishing rod; diving mask: snorkel; running shirt: tank top; skis= +skis, ski boot; sled: sledge; ice skate
bullseye= *target, bullseye, dartboard; yo-yo= yo-yo, yoyo; *kite; water pistol: water gun; pool 8 ball= 8 ball, pool 8 ball, eight ball, billiard ball; crystal ball; magic wand: wand
video game= *game controller, video game, gamepad; game die= *die/dice, game die/game dice, dice/dice; puzzle piece= *puzzle piece, puzzle, jigsaw piece; *teddy bear: teddy; piñata: pinata
mirror ball: disco ball; nesting dolls= +nesting dolls; heart suit= *heart, heart suit, red heart, love heart; spade suit: spade; diamond suit: ; club suit: ; chess pawn= *chess pawn, pawn, chess piece
joker: joker card; mahjong red dragon: mahjong tile; flower playing cards= +flower playing cards; performing arts= +theater masks, +performing arts; framed picture= *painting, framed picture
artist palette= *palette, artist palette, paint palette; thread= spool of thread/spools of thread, ~thread; sewing needle: needle; yarn= *ball of yarn/balls of yarn, ~yarn; knot: rope
*glasses= +glasses, +eyeglasses; *sunglasses= +sunglasses; goggles= +goggles; necktie= tie, necktie; t-shirt= *shirt, t-shirt, tee shirt; jeans= +jeans, +pants, +trousers
scarf/scarves; gloves= +gloves; coat: jacket; socks= +socks; *dress: gown; one-piece swimsuit: swimsuit; briefs= +briefs, +underpants; shorts= +shorts, +swim trunks
woman’s clothes= blouse, ~woman's clothes; folding hand fan: hand fan, fan; handbag: bag; purse: coin purse, wallet; clutch bag: pouch; shopping bags= +shopping bags; backpack: schoolbag, rucksack
thong sandal: flip-flop; man’s shoe: leather shoe; running shoe= *shoe, running shoe, sneaker; hiking boot: boot; flat shoe: slipper; high-heeled shoe: high heel; woman’s sandal: sandal
ballet shoes= +ballet shoes; hair pick: comb; *crown; woman’s hat: sun hat; top hat= *hat, top hat; graduation cap; billed cap= cap, billed cap, baseball cap; military helmet: helmet
prayer beads= +prayer beads, necklace; lipstick; ring: diamond ring; gem stone= *diamond, gem stone, gem, jewel; bell= *bell, golden bell; musical score= ~sheet music, musical score
musical note= musical note, music note; musical notes= +musical notes; speaker low volume= !speaker low volume; speaker medium volume= !speaker medium volume; speaker high volume= speaker, !speaker high volume
control knobs= +control knobs; bell with slash= !bell with slash; microphone: mic; headphone= +headphones, headphone; *guitar: electric guitar; musical keyboard= *piano, musical keyboard, piano keyboard
postal horn: horn; trumpet; violin: fiddle; *drum: snare drum; long drum: conga drum; maracas= +maracas; mobile phone= *phone, mobile phone, cell phone, smartphone
mobile phone with arrow= !mobile phone with arrow; telephone: red telephone; telephone receiver: phone receiver; electric plug: plug; *laptop: notebook computer; desktop computer= computer, desktop computer
computer mouse/computer mice; optical disk: cd, compact disc; floppy disk: diskette; film frames= +film frames, film strip; clapper board: clapperboard; television= *tv, television; *camera
camera with flash= !camera with flash; videocassette: vhs tape; magnifying glass tilted left= magnifying glass/magnifying glasses, !magnifying glass tilted left; magnifying glass tilted right= !magnifying glass tilted right
*candle; light bulb= *light bulb, lightbulb; flashlight: torch; red paper lantern= lantern, red paper lantern, paper lantern; diya lamp: oil lamp; closed book= *book, closed book, red book; books= +books, stack of books/stacks of books
notebook with decorative cover= !notebook with decorative cover; page with curl= !page with curl; page facing up= !page facing up; scroll: parchment; bookmark tabs= +bookmark tabs; label: tag, price tag
money bag: bag of money/bags of money; coin: gold coin; dollar banknote= ~money, dollar banknote, dollar bill; money with wings= ~money with wings; envelope= *letter, envelope; e-mail: email
envelope with arrow= !envelope with arrow; package: parcel, cardboard box; chart increasing with yen= !chart increasing with yen; chart increasing= !chart increasing; chart decreasing= !chart decreasing
closed mailbox with raised flag= mailbox, !closed mailbox with raised flag; closed mailbox with lowered flag= !closed mailbox with lowered flag; open mailbox with raised flag= !open mailbox with raised flag
open mailbox with lowered flag= !open mailbox with lowered flag; ballot box with ballot= ballot box, !ballot box with ballot; *pencil; black nib: pen nib; pen: ballpoint pen; paintbrush: brush; memo: note
card index dividers= +card index dividers; calendar; pushpin: pin, thumbtack; paperclip: paper clip; linked paperclips= +linked paperclips; straight ruler: ruler; *scissors= +scissors; wastebasket: trash can
locked= lock, ~locked, padlock; unlocked= ~unlocked, open lock; locked with pen= ~locked with pen; locked with key= ~locked with key; *key: golden key; hammer= *hammer; axe: hatchet; pick: pickaxe
hammer and pick= !hammer and pick; hammer and wrench= !hammer and wrench; dagger= sword, dagger; crossed swords= +crossed swords, +swords; bomb; bow and arrow= bow and arrow/bows and arrows
carpentry saw: saw; wrench: spanner; nut and bolt= !nut and bolt, bolt; gear: cog; clamp: vise; balance scale: +scales; white cane; link: chain link; chains= +chains; magnet: horseshoe magnet
test tube; dna= ~dna; satellite antenna: satellite dish; drop of blood= drop of blood/drops of blood, ~blood; adhesive bandage: band-aid; x-ray; door= *door; window; *bed; couch and lamp= couch, !couch and lamp, sofa
*chair: wooden chair; bathtub: bath; mouse trap: mousetrap; lotion bottle: shampoo bottle; roll of paper= ~toilet paper, roll of paper/rolls of paper; bucket: pail; soap= ~soap, bar of soap/bars of soap
bubbles= +bubbles; toilet; shopping cart: shopping trolley; headstone: gravestone, tombstone; funeral urn: urn; placard: sign; identification card: id card; syringe; pill: capsule; moai: easter island statue
briefcase; telescope; ladder; mirror; broom; toothbrush; twelve o’clock; ginger root; crutch; one-piece swimsuit; seat: airplane seat; rescue worker’s helmet: ; rosette; level slider: 
""".strip()  # noqa: E501

# With the everyday ones, some 300 things that people really type. They are drawn more often than the rest; lists of
# prompts are drawn from the 150 alone, so that these stay what they are.
COMMON = """
wolf, raccoon, zebra, deer, goat, camel, llama, rhinoceros, hippopotamus, mouse, hamster, chipmunk, hedgehog, koala,
sloth, kangaroo, chicken, rooster, baby chick, eagle, swan, flamingo, peacock, parrot, goose, crocodile, lizard,
whale, dolphin, octopus, jellyfish, snail, ant, lady beetle, feather, tulip, potted plant, palm tree, evergreen tree,
maple leaf, mango, pear, peach, blueberries, kiwi fruit, coconut, avocado, eggplant, potato, cucumber, broccoli,
onion, croissant, pretzel, bagel, pancakes, waffle, cut of meat, bacon, cooking, spaghetti, steaming bowl, lobster,
shrimp, soft ice cream, cupcake, pie, candy, lollipop, teapot, teacup without handle, cocktail glass, cup with straw,
spoon, kitchen knife, compass, tent, ferris wheel, fountain, ambulance, fire engine, police car, racing car, kick
scooter, skateboard, anchor, canoe, flying saucer, luggage, hourglass not done, watch, alarm clock, ringed planet,
tornado, droplet, vertical traffic light, ribbon, yo-yo, pool 8 ball, magic wand, backpack, handbag, purse, socks,
gloves, scarf, jeans, coat, necktie, hiking boot, high-heeled shoe, billed cap, ring, lipstick, microphone, headphone,
radio, saxophone, trumpet, violin, flute, musical note, desktop computer, keyboard, computer mouse, magnifying glass
tilted left, flashlight, books, newspaper, money bag, coin, dollar banknote, closed mailbox with raised flag, pen,
paintbrush, calendar, locked, axe, dagger, bomb, shield, wrench, screwdriver, gear, magnet, ladder, microscope,
telescope, pill, mirror, window, couch and lamp, toilet, broom, basket, bucket, soap, toothbrush
""".strip()

# Sprites that are one thing in two drawings: decided by the names and by looking at the sprites. First = class name.
LOOKALIKES = """
monkey, monkey face; dog, dog face; guide dog, service dog; cat, cat face; tiger, tiger face; horse, horse face
cow, cow face; pig, pig face; mouse, mouse face, rat; rabbit, rabbit face; camel, two-hump camel
baby chick, front-facing baby chick, hatching chick; dragon, dragon face; whale, spouting whale
shamrock, four leaf clover; nest with eggs, empty nest; mountain, snow-capped mountain; house, house with garden
globe showing Americas, globe showing Europe-Africa, globe showing Asia-Australia; sunrise, sunrise over mountains
beach with umbrella, umbrella on ground; cityscape, cityscape at dusk, sunset; bullet train, high-speed train
tram, tram car, station; bus, oncoming bus; police car, oncoming police car; taxi, oncoming taxi
automobile, oncoming automobile; delivery truck, articulated lorry; manual wheelchair, motorized wheelchair
passenger ship, ferry; airplane, small airplane; airplane departure, airplane arrival
mountain cableway, aerial tramway; hourglass not done, hourglass done; star, glowing star; sun, sun with face
full moon, new moon, waxing crescent moon, first quarter moon, waxing gibbous moon, waning gibbous moon,
last quarter moon, waning crescent moon, new moon face, full moon face
crescent moon, first quarter moon face, last quarter moon face; snowman, snowman without snow
sun behind cloud, sun behind small cloud, sun behind large cloud; umbrella, umbrella with rain drops
cloud with lightning, cloud with lightning and rain; sports medal, 1st place medal, 2nd place medal, 3rd place medal
american football, rugby football; ticket, admission tickets; field hockey, ice hockey; musical note, musical notes
speaker high volume, speaker medium volume, speaker low volume; loudspeaker, megaphone
mobile phone, mobile phone with arrow; optical disk, dvd; camera, camera with flash
magnifying glass tilted left, magnifying glass tilted right; page facing up, page with curl
closed book, green book, blue book, orange book, notebook with decorative cover
dollar banknote, yen banknote, euro banknote, pound banknote; envelope, e-mail, incoming envelope, envelope with arrow
outbox tray, inbox tray; pen, fountain pen; file folder, open file folder; calendar, tear-off calendar
closed mailbox with raised flag, closed mailbox with lowered flag, open mailbox with raised flag,
open mailbox with lowered flag; chart increasing, chart decreasing; paperclip, linked paperclips; locked, unlocked
""".strip()


def read_objects() -> list[tuple[str, str, str, str]]:
    """(codepoints, name, group, subgroup) of every fully-qualified emoji of `GROUPS`, in Unicode's order."""
    rows, group, subgroup = [], "", ""
    for line in (UNICODE / "emoji/emoji-test.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.removeprefix("# subgroup:").strip()
        found = re.match(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E\S+ (.*)", line)
        if found and group in GROUPS:
            rows.append((found[1], found[2], group, subgroup))
    return rows


def read_keywords() -> dict[str, str]:
    """CLDR's keywords, `|` between them, by character without variation selectors."""
    root = ElementTree.parse(UNICODE / "cldr/common/annotations/en.xml")
    return {a.get("cp"): "|".join(a.text.split(" | ")) for a in root.iter("annotation") if a.get("type") != "tts"}


def read_words() -> tuple[dict[str, list[str]], list[str]]:
    """The words of each name in `WORDS`, and the names that are everyday ones."""
    words, everyday = {}, []
    for entry in re.split(r"[;\n]", WORDS):
        if not (entry := entry.strip()):
            continue
        if "= " in entry:  # the name, then all its words in order
            name, _, rest = entry.partition("= ")
            own = []
        else:  # the name is the first word
            name, _, rest = entry.partition(":")
            own = [name.lstrip("*")]
            name = name.partition("/")[0]
        listed = own + [w.strip() for w in rest.split(",") if w.strip()]
        if entry.startswith("*") or any("*" in w for w in listed):
            everyday.append(name.lstrip("*"))
        name = name.lstrip("*")
        words[name] = [w.replace("*", "") for w in listed] if len(listed) >= len(words.get(name, [])) else words[name]
    return words, everyday


def plain(word: str) -> str:
    """The caption's spelling of a word: lower case, straight apostrophe, without markers and plural."""
    return word.lower().replace("’", "'").lstrip("+~^!").partition("/")[0]


def row_words(name: str, words: dict[str, list[str]]) -> list[str]:
    """Words of one object, CLDR's own name included."""
    spelled = name.lower().replace("’", "'")
    clock = "~" if re.search(r"o'clock|-thirty$", spelled) else ""
    listed = [w.lower().replace("’", "'") for w in words.get(name, [clock + spelled])]
    if spelled not in map(plain, listed):
        listed.append("!" + spelled)
    return listed


def main() -> None:
    """Write the table to stdout and fail on any contradiction."""
    objects, keywords, (words, everyday) = read_objects(), read_keywords(), read_words()
    names = [name for _, name, _, _ in objects]
    first = {}
    for entry in LOOKALIKES.replace(",\n", ", ").replace("\n", ";").split(";"):
        members = [m.strip() for m in entry.split(",")]
        first.update(dict.fromkeys(members, members[0]))
    first.update({n: "twelve o’clock" for n in names if re.search("o’clock|-thirty$", n)})
    common = {" ".join(name.split()) for name in COMMON.split(",")}
    unknown = sorted((set(words) | set(first) | set(KEYWORDS) | common) - set(names))
    owner: dict[str, str] = {}
    lines = ["codepoints\tname\tgroup\tsubgroup\teveryday\tclass\twords\tkeywords"]
    for codepoints, name, group, subgroup in objects:
        char = "".join(chr(int(c, 16)) for c in codepoints.split())
        listed = row_words(name, words)
        for word in map(plain, listed):
            if owner.setdefault(word, name) != name:
                raise SystemExit(f"'{word}' is a word of both {owner[word]} and {name}")
        tags = keywords.get(char.replace("\ufe0f", "")) or KEYWORDS[name]
        flag = "1" if name in everyday else "2" if name in common else "0"
        looks = first.get(name, name)
        lines.append("\t".join((codepoints, name, group, subgroup, flag, looks, "|".join(listed), tags)))
    counts = {g: sum(n in everyday for _, n, gg, _ in objects if gg == g) for g in GROUPS}
    print(len(objects), "objects;", len(everyday), "everyday:", counts, file=sys.stderr)
    if unknown or len(objects) != 849 or len(everyday) != 150 or min(counts.values()) < 25:
        raise SystemExit(f"not what it should be: names unknown to Unicode: {unknown}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
