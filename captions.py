"""Words about a person: a closed vocabulary, what a sentence says in it, and what an avatar shows.

Facts are pairs of a factor and a value, such as ('hair', 'red'). `understand` finds them in a
sentence and tells which words it does not know, `facts_of` finds them of an avatar in its folder
(what its json says; colours and the length of hair by its portrait), and `caption` makes a sentence
of them. docs/data.md lists the keys that are read.
"""
import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import rodinhd as rh

# Facts --------------------------------------------------------------------------------------------
# The values of each factor, each with its synonyms; of several words, `-` joins them. The first
# synonym is what captions say, and a word that no colour or shade comes before stands for itself.
COLOURS = {
    'black': 'black',
    'white': 'white ivory',
    'grey': 'grey gray silver charcoal',
    'brown': 'brown tan khaki beige chestnut maroon chocolate',
    'red': 'red crimson scarlet burgundy',
    'orange': 'orange',
    'yellow': 'yellow golden gold mustard',
    'green': 'green olive lime emerald mint',
    'turquoise': 'turquoise teal cyan aqua',
    'blue': 'blue navy azure indigo',
    'purple': 'purple violet lilac lavender magenta',
    'pink': 'pink rose salmon fuchsia',
}
SHADES = {
    'dark': 'dark deep navy charcoal burgundy maroon olive',
    'light': 'light pale pastel mint lavender beige',
    'bright': 'bright vivid neon',
}
VOCABULARY = {
    'sex': {
        'woman': 'woman female girl lady women she her businesswoman mother grandmother wife '
                 'daughter sister aunt queen princess actress waitress mom grandma',
        'man': 'man male boy guy gentleman men he his fellow dude businessman father grandfather '
               'husband son brother uncle king prince actor waiter dad grandpa',
    },
    'group': {
        'asian': 'asian chinese japanese korean',
        'black': 'african african-american afro-american',
        'hispanic': 'hispanic latino latina latin mexican',
        'middle eastern': 'middle-eastern arab arabic persian turkish mena',
        'native american': 'native-american indigenous american-indian',
        'pacific islander': 'pacific-islander polynesian hawaiian maori',
        'white': 'caucasian european',
    },
    'skin': {
        'pale': 'pale-skinned fair-skinned light-skinned white-skinned',
        'tan': 'tan-skinned tanned olive-skinned',
        'brown': 'brown-skinned',
        'dark': 'dark-skinned black-skinned',
    },
    'length': {
        'bald': 'bald hairless shaved shaven bald-headed',
        'short': 'short-haired buzzcut buzz-cut crewcut crew-cut pixie short cropped',
        'chin-length': 'chin-length bob medium-length bun tied tied-back',
        'long': 'long-haired long shoulder-length ponytail flowing braids dreadlocks',
        'big': 'curly curls afro curly-haired frizzy wavy voluminous big',
    },
    'hair': {
        'black': 'black-haired raven-haired dark-haired raven jet-black',
        'brown': 'brunette brown-haired auburn',
        'blonde': 'blonde blond blondes fair-haired blonde-haired',
        'red': 'redhead ginger red-haired red-headed redheaded copper',
        'grey': 'grey-haired gray-haired',
        'white': 'white-haired',
        'blue': 'blue-haired',
        'green': 'green-haired',
        'purple': 'purple-haired',
        'pink': 'pink-haired',
    },
    'clothes': dict.fromkeys(COLOURS, ''),
    'shade': dict.fromkeys(SHADES, ''),
    'outfit': {
        'suit': 'suit blazer tie businessman businesswoman tuxedo business formal necktie',
        'camouflage': 'camouflage camo military soldier army fatigues camouflage-uniform combat',
        'scrubs': 'scrubs doctor nurse medical surgeon surgical lab-coat',
        'workwear': 'workwear overshirt worker work-shirt utility mechanic denim jacket workman '
                    'overalls dungarees',
        'shirt': 'shirt t-shirt tee tshirt polo blouse casual sweater jumper top pullover '
                 'turtleneck',
    },
    'expression': {
        'neutral': 'neutral serious calm expressionless',
        'smiling': 'smiling smile smiles happy cheerful friendly',
        'laughing': 'laughing laugh laughs grinning grin grins joyful',
        'sad': 'sad unhappy frowning crying depressed frown',
        'surprised': 'surprised astonished shocked amazed open-mouthed',
        'eyes closed': 'sleeping asleep closed-eyes eyes-closed sleepy',
        'angry': 'angry furious mad annoyed scowling',
        'kissing': 'kissing pouting kiss pout',
        'winking': 'winking wink winks',
    },
    'beard': {
        'moustache': 'moustache mustache',
        'goatee': 'goatee',
        'full': 'beard bearded',
        'none': 'clean-shaven beardless',
    },
    'glasses': {
        'round': 'glasses spectacles eyeglasses',
        'dark': 'sunglasses',
    },
    'pattern': {
        'stripes': 'striped stripes',
        'checks': 'checked checkered plaid',
        'dots': 'dotted polka-dot polka-dots',
    },
    'eyes': {
        'brown': 'brown-eyed',
        'blue': 'blue-eyed',
        'green': 'green-eyed',
        'grey': 'grey-eyed gray-eyed',
    },
}
FACTS = [(factor, value) for factor, values in VOCABULARY.items() for value in values]
NUMBERS = {fact: i for i, fact in enumerate(FACTS)}
LONGEST = 400  # letters of a sentence

# What colours and other adjectives are about, and words that say nothing here.
NOUNS = {
    'hair': 'hair haired hairstyle haircut locks curls afro ponytail bob bun pixie braids '
            'dreadlocks buzzcut crewcut',
    'skin': 'skin complexion face skinned',
    'eyes': 'eyes eye eyed',
    'beard': 'beard moustache mustache goatee',
    'clothes': 'clothes clothing dress outfit shirt t-shirt tee tshirt polo blouse sweater jumper '
               'top suit blazer jacket scrubs coat lab-coat uniform workwear overshirt hoodie '
               'work-shirt pullover tuxedo cardigan camouflage-uniform fatigues costume garment '
               'overalls dungarees turtleneck sari jeans vest robe tunic kimono gown skirt '
               'waistcoat',
    'person': 'woman man girl boy lady guy gentleman person people adult male female someone '
              'women men fellow dude businessman businesswoman soldier doctor nurse worker '
              'surgeon mechanic workman mother grandmother wife daughter sister aunt queen '
              'princess actress waitress mom grandma father grandfather husband son brother uncle '
              'king prince actor waiter dad grandpa',
    'accessory': 'glasses sunglasses spectacles eyeglasses tie necktie',
}
SAYS_NOTHING = (
    'a an the of with and in on who is has having wears wearing dressed that are looks looking '
    'portrait photo picture image avatar it to very quite really some there this expression '
    'please make me i want show as at by for from but also plus which was be like colour color '
    'coloured colored head young adult front facing camera its their one render whose'
)
NEGATIONS = ('no', 'without', 'not')


class Understood(NamedTuple):
    """What a sentence says."""

    facts: dict  # factor: value
    unknown: list  # words that say nothing here, in their order


@functools.cache
def words_of():
    """Returns {word: [(factor, value)]} of all synonyms, colours and shades left out."""
    table = {}
    for factor, values in VOCABULARY.items():
        for value, synonyms in values.items():
            for word in synonyms.split():
                table.setdefault(word, []).append((factor, value))
    return table


def inverse(groups):
    """Turns {name: 'word word'} into {word: name}."""
    return {word: name for name, text in groups.items() for word in text.split()}


COLOUR_OF = inverse(COLOURS)
SHADE_OF = inverse(SHADES)
NOUN_OF = inverse(NOUNS)
# The skin that an adjective means, and the hair that a colour means, if not itself
SKIN_OF = {'white': 'pale', 'light': 'pale', 'fair': 'pale', 'black': 'dark', 'dark': 'dark',
           'brown': 'brown', 'grey': None}
HAIR_OF = {'orange': 'red', 'yellow': 'blonde', 'light': 'blonde', 'dark': 'black',
           'turquoise': 'blue', 'fair': 'blonde'}


def split(text):
    """Splits a sentence into words; those that one hyphen joins in the vocabulary, or might, are
    one word, and commas and full stops words of their own."""
    words = re.findall(r"[^\W_]+(?:[-'’][^\W_]+)*|[,.;]", text.lower())
    known = {*words_of(), *NOUN_OF}
    joined = []
    while words:
        for n in (3, 2):
            candidate = '-'.join(words[:n])
            if len(words) >= n and candidate in known:
                joined.append(candidate)
                del words[:n]
                break
        else:
            word = words.pop(0)
            if '-' in word and word not in known:
                words = [*word.split('-'), *words]
            else:
                joined.append(word)
    return joined


def understand(text):
    """Finds the facts of a sentence -> Understood.

    Colours, shades and lengths belong to the next noun of the same part of the sentence, or where
    none follows ('her hair is red') to the last one; before a person, black and white are groups.
    """
    reader = Reader()
    for word in split(text):
        reader.read(word)
    reader.bind(reader.last)
    return Understood(reader.facts, reader.unknown)


class Reader:
    """What `understand` knows after some words."""

    def __init__(self):
        self.facts = {}
        self.unknown = []
        self.waiting = []  # adjectives whose noun has not come yet
        self.last = None  # the kind of noun that came last
        self.dressed = False  # 'in' or 'wearing' came last
        self.negated = False
        self.stray = False  # a noun that says nothing came after the adjectives

    def read(self, word):
        """Takes the next word."""
        if word in NEGATIONS:
            self.negated = True
        elif word in ',.;' or word in ('and', 'with', 'who', 'in', 'wearing', 'dressed'):
            self.pause(word)
        elif word in words_of() or word in NOUN_OF:
            self.speak(word)
        elif word in COLOUR_OF or word in SHADE_OF or word == 'fair':
            self.waiting.append(word)
        elif word not in SAYS_NOTHING.split():
            self.unknown.append(word)
            self.stray = bool(self.waiting)

    def pause(self, word):
        """Adjectives that are left belong to what came before, or to clothes after 'in'."""
        if word != 'and' and self.waiting:
            self.bind('clothes' if self.dressed else self.last)
        if word in ('in', 'wearing', 'dressed'):
            self.dressed = True
        elif word != 'and':
            self.dressed = False
        if word in ('in', 'wearing', 'with', 'dressed'):
            self.last = None
        self.negated = False

    def speak(self, word):
        """Takes a word of the vocabulary, which may be a noun, too."""
        kind = NOUN_OF.get(word)
        if self.negated:
            self.deny(word, kind)
            return
        if kind in ('skin', 'hair', 'eyes', 'beard', 'clothes', 'person'):
            self.bind(kind)
        elif kind == 'accessory':
            self.unknown += self.waiting
            self.waiting.clear()
        for factor, value in words_of().get(word, []):
            if factor == 'length' and kind is None and word in ('short', 'long', 'big', 'tied'):
                self.waiting.append(word)
            else:
                self.facts[factor] = value
        if kind in ('skin', 'hair', 'eyes', 'clothes', 'beard'):
            self.last = kind
            self.dressed = False

    def deny(self, word, kind):
        """'No hair' is bald and 'no beard' none; other denials leave the fact out."""
        self.negated = False
        self.waiting.clear()
        if kind == 'hair':
            self.facts['length'] = 'bald'
        elif kind == 'beard':
            self.facts['beard'] = 'none'

    def bind(self, kind):
        """Says what the waiting adjectives mean of a kind of noun; what is unknown is worn."""
        if self.stray and kind == self.last:
            kind = 'clothes'
        self.stray = False
        for word in self.waiting:
            colour = COLOUR_OF.get(word)
            shade = SHADE_OF.get(word)
            if self.dressed and kind is None:
                kind = 'clothes'
            if kind == 'hair':
                self.bind_hair(word, colour, shade)
            elif kind == 'skin':
                value = SKIN_OF.get(word) or SKIN_OF.get(shade) or SKIN_OF.get(colour)
                value = 'tan' if word in ('tan', 'olive') else value
                self.say('skin', value)
            elif kind == 'eyes':
                self.say('eyes', colour)
            elif kind == 'clothes':
                self.say('clothes', colour)
                self.say('shade', shade)
            elif kind == 'person' and word in ('black', 'white'):
                self.facts['group'] = word
            elif kind == 'person' and shade in ('dark', 'light'):
                self.say('skin', SKIN_OF[shade])
            else:
                self.unknown.append(word)
        self.waiting.clear()

    def bind_hair(self, word, colour, shade):
        """Says what an adjective means of hair; 'dark brown hair' is brown."""
        for factor, value in words_of().get(word, []):
            self.say(factor, value)
        if colour and word not in words_of():
            self.say('hair', HAIR_OF.get(colour, colour))
        elif shade and not any(COLOUR_OF.get(other) for other in self.waiting):
            self.say('hair', HAIR_OF.get(shade))
        elif word in HAIR_OF and not shade:
            self.say('hair', HAIR_OF[word])

    def say(self, factor, value):
        if (factor, value) in NUMBERS:
            self.facts[factor] = value


def describe(facts):
    """Writes facts in one line: 'hair red, length long'."""
    return ', '.join(f'{factor} {value}' for factor, value in facts.items())


def as_vector(facts):
    """Facts as a row of zeros and ones, (len(FACTS),)."""
    row = torch.zeros(len(FACTS))
    for fact in facts.items():
        row[NUMBERS[fact]] = 1
    return row


# What is seen -------------------------------------------------------------------------------------
# Portraits are framed alike (scenes.py), so shares of their height tell where hair and clothes are.
def lightness_and_hue(rgb):
    """CIE LCh (lightness 0..100, chroma, hue in degrees) of one sRGB colour (3,) in 0..1."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    a = 500 * (f[0] - f[1])
    b = 200 * (f[1] - f[2])
    return 116 * f[1] - 16, np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360


HUES = (  # up to which hue, in degrees, a colour has its name
    (15, 'pink'), (45, 'red'), (75, 'orange'), (108, 'yellow'), (165, 'green'), (232, 'turquoise'),
    (302, 'blue'), (335, 'purple'), (360, 'pink'),
)


def colour_name(rgb):
    """The colour of COLOURS that an sRGB colour (3,) in 0..1 has.

    The same hue has several names: dark pink is purple or red, dull orange is brown.
    """
    light, chroma, hue = lightness_and_hue(rgb)
    warm = 30 < hue < 108
    if chroma < (6 if warm and 20 < light < 50 else 9) or light < 5:
        return 'black' if light < 30 else 'grey' if light < 82 else 'white'
    name = next(name for most, name in HUES if hue <= most)
    if name == 'pink' and chroma < 13:
        return 'grey' if light > 40 else 'purple' if hue > 180 else 'brown'
    if name == 'pink' and light < 50 and 180 < hue < 350:
        return 'purple'
    if name == 'pink' and light < 38:
        return 'red'
    if name == 'purple' and light > 85 and hue > 318:
        return 'pink'
    if name == 'red' and (chroma < 15 or (chroma < 40 and light < 40 and hue > 35)):
        return 'brown'
    if name == 'red' and light > 58 and chroma < 60:
        return 'pink'
    if name in ('orange', 'yellow') and hue > 90 and light < 60:
        return 'green' if chroma > 15 else 'brown'
    if name == 'orange' and (chroma < 40 or light < 52):
        return 'brown'
    if name == 'yellow' and (light < 48 or chroma < 24):
        return 'brown'
    if name == 'turquoise' and hue < 180 and light < 50:
        return 'green'
    return name


def shade_name(rgb):
    """The shade of SHADES that a colour has, or None."""
    light, chroma, _ = lightness_and_hue(rgb)
    if chroma > 55 and light > 45:
        return 'bright'
    return 'dark' if light < 35 else 'light' if light > 72 else None


def hair_name(rgb, short=False):
    """The colour that hair of an sRGB colour has. Black hair shines grey, blue and brown, and
    `short` hair lies in its own shadow: red is less red there."""
    light, chroma, hue = lightness_and_hue(rgb)
    warm = 25 <= hue < 100
    if (light < 24 and chroma < 14) or light < 14:
        return 'black'
    if chroma < (7 if warm else 10):
        return 'black' if light < 38 else 'grey' if light < 75 else 'white'
    if warm:
        if light > 18 and hue < 62.5 and chroma > (22 if short else 26):
            return 'red'
        return 'blonde' if light > 52 and hue > 62 else 'brown'
    if hue < 25 and chroma < 22:
        return 'brown'
    name = colour_name(rgb)
    name = HAIR_OF.get(name, name)
    return name if name in VOCABULARY['hair'] else 'black'


def skin_name(rgb):
    """The name of a face's colour."""
    light = lightness_and_hue(rgb)[0]
    return 'dark' if light < 42 else 'brown' if light < 54 else 'tan' if light < 66 else 'pale'


def median_of(rgba, rows, columns):
    """The median colour (3,) in 0..1 of the opaque pixels in a part of a portrait (P, P, 4), which
    two pairs of shares of its side name; None where there are hardly any."""
    P = len(rgba)
    part = rgba[round(rows[0] * P):round(rows[1] * P), round(columns[0] * P):round(columns[1] * P)]
    pixels = part[part[..., 3] > 0.5][:, :3]
    return None if len(pixels) < 0.15 * part.shape[0] * part.shape[1] else np.median(pixels, axis=0)


def mean_of_both(rgba, rows, sides):
    """The mean of median_of two parts, left and right; None where one of them is None."""
    found = [median_of(rgba, rows, columns) for columns in sides]
    return None if any(x is None for x in found) else np.mean(found, axis=0)


def skin_colour(rgba):
    """The colour (3,) of a portrait's cheeks; None where it has none."""
    return mean_of_both(rgba, (0.3, 0.36), ((0.42, 0.46), (0.54, 0.58)))


def clothes_colour(rgba):
    """The colour (3,) of what is worn on a portrait's shoulders; None where it shows none."""
    return mean_of_both(rgba, (0.64, 0.78), ((0.2, 0.34), (0.66, 0.8)))


def seen_length(rgba):
    """How long hair is, by the silhouette of a portrait (P, P, 4): a value of 'length'."""
    widths = (rgba[..., 3] > 0.5).mean(1)
    P = len(widths)

    def at(share):
        return widths[round(share * P)]

    if at(0.38) > max(0.4, 1.26 * at(0.235)):  # it widens below the eyes; straight hair by 1.22
        return 'big'
    if at(0.445) < 0.277:
        return 'short'
    return 'long' if at(0.485) > 0.29 else 'chin-length'


def seen_facts(rgb, alpha, length=None):
    """Finds the facts that a portrait shows, whose background is cut out: colours of hair, skin
    and clothes, and where `length` is not given how long hair is.

    Takes rgb (3, P, P) in [-1, 1] and alpha (1, P, P) in 0..1.
    """
    rgba = torch.cat([(rgb + 1) / 2, alpha]).permute(1, 2, 0).double().numpy()
    if alpha.mean() > 0.95 or alpha.mean() < 0.05:  # no background was cut out
        return {}
    facts = {}
    facts['length'] = length or seen_length(rgba)
    hair = hair_colour(rgba, facts['length'])
    skin = skin_colour(rgba)
    if skin is not None:
        facts['skin'] = skin_name(skin)
        if hair is not None and length is None and facts['length'] == 'short' and alike(hair, skin):
            facts['length'] = 'bald'
        facts |= seen_beard(rgba, skin)
    if facts['length'] != 'bald' and hair is not None:
        facts['hair'] = hair_name(hair, facts['length'] == 'short')
    cloth = clothes_colour(rgba)
    if cloth is not None:
        facts['clothes'] = colour_name(cloth)
        shade = shade_name(cloth)
        if shade and facts['clothes'] not in ('black', 'white'):
            facts['shade'] = shade
    return facts


def alike(hair, skin):
    """Whether what is on top of the head has the colour of skin: nobody's hair."""
    (light, chroma, hue), (light2, chroma2, hue2) = map(lightness_and_hue, (hair, skin))
    apart = chroma * np.exp(1j * np.radians(hue)) - chroma2 * np.exp(1j * np.radians(hue2))
    return abs(apart) < 6 and light > light2 - 6


BEARDED = 0.76  # of the lightness of the cheeks has a chin with a beard, at most


def seen_beard(rgba, skin):
    """{'beard': 'full'} where the chin is much darker than the cheeks, whose colour `skin` is, and
    'none' where it is not darker; {} in between, and of dark faces, which tell nothing."""
    chin = median_of(rgba, (0.41, 0.43), (0.47, 0.53))
    light = lightness_and_hue(skin)[0]
    if chin is None or light < 42:
        return {}
    share = lightness_and_hue(chin)[0] / light
    return {'beard': 'full'} if share < BEARDED else {'beard': 'none'} if share > 0.86 else {}


def hair_colour(rgba, length):
    """The colour (3,) of hair: on top, and of hair that hangs beside the face half of it from
    there."""
    opaque = rgba[..., 3] > 0.5
    P = len(rgba)
    rows = np.flatnonzero(opaque.mean(1) > 0.02)
    if not len(rows):
        return None
    above = rows[0] / P
    top = median_of(rgba, (above + 0.02, above + 0.075), (0.42, 0.58))
    if length in ('short', 'chin-length') or top is None:
        return top
    pixels = []
    for row in range(round(0.27 * P), round(0.43 * P)):
        columns = np.flatnonzero(opaque[row])
        if len(columns):
            inset = round(0.015 * P)
            width = round(0.045 * P)
            for side in (columns[inset:inset + width], columns[::-1][inset:inset + width]):
                pixels.append(rgba[row, side, :3])
    return (top + np.median(np.concatenate(pixels), axis=0)) / 2 if pixels else top


# What a folder says -------------------------------------------------------------------------------
OUTFITS = {'busi': 'suit', 'milit': 'camouflage', 'medi': 'scrubs', 'util': 'workwear',
           'casual': 'shirt', 'default': 'shirt'}
GROUPS = {'asian': 'asian', 'black': 'black', 'hispanic': 'hispanic', 'mena': 'middle eastern',
          'aian': 'native american', 'nhpi': 'pacific islander', 'white': 'white'}
EXPRESSIONS = {'smile': 'smiling', 'laugh': 'laughing', 'eyes_closed': 'eyes closed',
               'kiss': 'kissing', 'wink': 'winking', 'open': 'surprised', 'asleep': 'eyes closed'}


def facts_of(folder, rgb, alpha):
    """Finds the facts of the avatar in a folder, whose portrait this is (scenes.portrait_of) ->
    {factor: value}.

    They are those that its portrait shows, over them what its json says ('sex', 'group', 'outfit',
    'expression', 'hair', 'identity', or the 'factors' of avatars.py), and over them those of its
    caption.txt.
    """
    folder = Path(folder)
    path = next((p for p in (folder / 'transforms_train.json', folder / 'transforms.json')
                 if p.is_file()), None)
    try:
        meta = json.loads(path.read_bytes()) if path else {}
    except ValueError as error:
        rh.stop(f'{path}: not readable as JSON ({error})')
    said = said_facts(meta)
    facts = {}
    if 'factors' not in meta:
        facts = seen_facts(rgb, alpha, said.get('length'))
        if said.get('sex') == 'woman':
            facts.pop('beard', None)
    facts |= said
    text = folder / 'caption.txt'
    if text.is_file():
        try:
            facts |= understand(text.read_text(encoding='utf-8')[:LONGEST]).facts
        except ValueError as error:
            rh.stop(f'{text}: not readable as a caption ({error})')
    return facts


def said_facts(meta):
    """The facts that the json of an avatar says."""
    if 'factors' in meta:
        return drawn_facts(meta['factors'])
    facts = people_of(str(meta.get('identity', '')))
    for factor, table in (('outfit', OUTFITS), ('expression', EXPRESSIONS), ('group', GROUPS),
                          ('sex', {'f': 'woman', 'm': 'man', 'female': 'woman', 'male': 'man'}),
                          ('beard', {}), ('glasses', {})):
        value = str(meta.get(factor, '')).lower()
        value = table.get(value, value)
        if (factor, value) in NUMBERS:
            facts[factor] = value
    if meta.get('hair') in VOCABULARY['length']:
        facts['length'] = meta['hair']
    return facts


def people_of(identity):
    """Sex and group that all people share of whom an identity is, such as 'White_F_3+Asian_F_1'."""
    people = [re.fullmatch(r'(?:X_)?([A-Za-z]+)_([FM])_\w+', part) for part in identity.split('+')]
    facts = {}
    if all(people):
        sexes = {person[2] for person in people}
        groups = {person[1].lower() for person in people}
        if len(sexes) == 1:
            facts['sex'] = 'woman' if sexes == {'F'} else 'man'
        if len(groups) == 1 and groups <= GROUPS.keys():
            facts['group'] = GROUPS[groups.pop()]
    return facts


def of_hex(code):
    """A colour (3,) in 0..1 of six hexadecimal digits."""
    return np.array(list(bytes.fromhex(code))) / 255


def drawn_facts(factors):
    """The facts of what avatars.py has drawn."""
    style = factors['hair_style']
    lengths = {'bald': 'bald', 'long': 'long', 'ponytail': 'long', 'bun': 'chin-length'}
    cloth = of_hex(factors['clothes_colour'])
    eyes = colour_name(of_hex(factors['eye_colour']))
    facts = {
        'length': lengths.get(style, 'short'),
        'skin': skin_name(of_hex(factors['skin_colour']) * 0.9),
        'clothes': colour_name(cloth),
        'eyes': {'turquoise': 'blue', 'yellow': 'brown', 'orange': 'brown'}.get(eyes, eyes),
        'expression': EXPRESSIONS.get(factors['expression'], factors['expression']),
        'beard': {'no': 'none'}.get(factors['beard'], factors['beard']),
    }
    if style != 'bald':
        facts['hair'] = hair_name(of_hex(factors['hair_colour']))
    if shade_name(cloth) and facts['clothes'] not in ('black', 'white'):
        facts['shade'] = shade_name(cloth)
    for factor in ('glasses', 'pattern'):
        facts[factor] = {'bars': 'stripes'}.get(factors[factor], factors[factor])
    return {factor: value for factor, value in facts.items() if (factor, value) in NUMBERS}


# Sentences ----------------------------------------------------------------------------------------
def caption(facts, rng):
    """Makes a sentence of facts; rng, a random.Random, picks among words and phrasings.

    `understand` finds the same facts in it.
    """
    def word(factor):
        value = facts.get(factor)
        synonyms = [w for w in VOCABULARY[factor].get(value, '').split() if w not in COLOUR_OF]
        return rng.choice(synonyms[:3]) if synonyms else value

    person = {'man': 'man', 'woman': 'woman'}.get(facts.get('sex'), 'person')
    before = [facts['expression']] if facts.get('expression') in BEFORE else []
    if 'group' in facts:
        before.append(words_first('group', facts['group']))
    if facts.get('length') == 'bald':
        before.append('bald')
    if 'skin' in facts:
        before.append(words_first('skin', facts['skin']))
    text = ' '.join([*before, person])
    text = ('an ' if text[0] in 'aeiou' else 'a ') + text

    parts = []
    hair = []
    if facts.get('length') not in (None, 'bald'):
        hair.append(facts['length'] if facts['length'] != 'big' else word('length'))
    if 'hair' in facts:
        hair.append(facts['hair'])
    if hair:
        parts.append(f'with {" ".join(hair)} hair')
    clothes = [facts[name] for name in ('shade', 'clothes') if name in facts]
    outfit = {'camouflage': 'camouflage uniform', 'shirt': rng.choice(['shirt', 't-shirt'])}
    if clothes or 'outfit' in facts:
        noun = outfit.get(facts.get('outfit'), facts.get('outfit', 'clothes'))
        parts.append(f'{rng.choice(["in", "wearing"])} {" ".join([*clothes, noun])}')
    if facts.get('expression') == 'eyes closed':
        parts.append('with closed eyes')
    for factor in ('beard', 'glasses', 'pattern'):
        if facts.get(factor) not in (None, 'none'):
            parts.append(f'with {words_first(factor, facts[factor])}')
    if facts.get('beard') == 'none':
        parts.append('without beard')
    if 'eyes' in facts:
        parts.append(f'with {facts["eyes"]} eyes')
    rng.shuffle(parts)
    return ', '.join([text, *parts]) if rng.random() < 0.5 else ' '.join([text, *parts])


BEFORE = ('neutral', 'smiling', 'laughing', 'sad', 'surprised', 'angry', 'kissing', 'winking')


def words_first(factor, value):
    """The first synonym of a value."""
    return VOCABULARY[factor][value].split()[0]
