"""Captions and attributes follow from the names of emoji; the groups are those of Unicode's list."""

import pytest

from scoresde.data.emoji_names import GROUPS, RANGES, attributes, caption, group


def code(text):
    return "-".join(f"{ord(sign):04X}" for sign in text)


NAMES = {
    "🫙": "jar",
    "🟥": "red square",
    "🏴": "black flag",
    "❤️": "red heart",
    "👩": "woman",
    "👩‍🚀": "woman astronaut",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("👩‍🚀", "woman astronaut"),
        ("🫙‍🟥", "jar, red square"),
        ("👩‍❤️", "woman, red heart"),
        ("👩‍❤", "woman, red heart"),  # without the selector of its style
        ("⬡️‍🟥", "white hexagon, red square"),  # a character with a name, but no emoji
        ("🏴󠁤󠁥󠁢󠁹󠁿", "flag DE-BY"),
        ("⬡", None),
        ("\ue041", None),
    ],
)
def test_sequences_without_a_name_have_those_of_their_parts(text, expected):
    assert caption(code(text), NAMES) == expected


HAT = "woman\u2019s hat"


@pytest.mark.parametrize(
    ("name", "tone", "gender", "subject"),
    [
        ("firefighter", "none", "person", "firefighter"),
        ("man firefighter medium-light skin tone", "medium-light", "man", "firefighter"),
        ("woman firefighter dark skin tone", "dark", "woman", "firefighter"),
        ("woman medium skin tone red hair", "medium", "woman", "red hair"),
        ("woman and man holding hands medium-dark skin tone", "medium-dark", None, "holding hands"),
        ("men holding hands dark skin tone light skin tone", None, "man", "holding hands"),
        ("person light skin tone", "light", "person", "person"),
        ("girl", "none", "woman", "girl"),
        ("thumbs up medium skin tone", "medium", "none", "thumbs up"),
        (HAT, "none", "none", HAT),
        ("Isle of Man", "none", "none", "Isle of Man"),
    ],
)
def test_attributes_are_what_the_name_says(name, tone, gender, subject):
    names = {code("🚒"): "man firefighter", code("👩"): name}
    expected = {"tone": tone, "gender": gender, "group": "people", "subject": subject}
    assert attributes(names)[code("👩")] == expected


def test_components_have_no_group_and_no_gender():
    found = attributes({code("🦰"): "red hair", code("👩‍🦰"): "woman red hair", code("🏽"): "medium skin tone"})
    assert found[code("🦰")] == {"tone": "none", "gender": "none", "group": None, "subject": "red hair"}
    assert found[code("🏽")]["tone"] == "medium"
    assert found[code("👩‍🦰")]["group"] == "people"


UNICODE = {
    "smileys": ["😀", "👁️‍🗨️", "🙈", "❤️"],
    "people": ["👁️", "🖐️", "👩‍🚀", "🧙"],
    "animals": ["🦊", "🍄"],
    "food": ["🍄‍🟫", "🍩", "🔪"],
    "travel": ["🚀", "⌚", "🔥"],
    "activities": ["⚽", "🪡"],
    "objects": ["🔨", "👑"],
    "symbols": ["#️⃣", "♀", "🟥"],
    "flags": ["🏳️‍🌈", "🇳🇴", "🎌"],
    None: ["⬡", "🏻", "🦰"],
}


@pytest.mark.parametrize(("name", "emoji"), [(name, text) for name, texts in UNICODE.items() for text in texts])
def test_groups_are_those_of_unicode(name, emoji):
    assert group(code(emoji)) == name


def test_no_code_point_is_in_two_groups():
    ends = [[int(end, 16) for end in part.split("-")] for text in RANGES.values() for part in text.split()]
    points = [point for end in ends for point in range(end[0], end[-1] + 1)]
    assert len(points) == len(set(points))
    assert len(GROUPS) == 9
