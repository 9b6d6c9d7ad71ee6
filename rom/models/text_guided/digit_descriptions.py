"""Handwritten digits in words: what stands in for a language model's descriptions in a study without downloads.

Written by hand for this package, six answers per class to the questions of `QUESTIONS`, in their order, about shape
only; no description names another digit, apart from counts of strokes and holes.
"""

QUESTIONS = (
    "What does its outline look like as a whole?",
    "Of which strokes is it written?",
    "Does it enclose an area?",
    "What does its upper half look like?",
    "What does its lower half look like?",
    "Where is there little or no ink?",
)

DIGITS = {
    "zero": [
        "A closed oval ring, taller than wide.",
        "One continuous curved stroke that returns to where it began.",
        "Yes, one large hole that fills the middle.",
        "A round arch that is open below.",
        "A round bowl that is open above.",
        "The centre is empty.",
    ],
    "one": [
        "A narrow upright bar.",
        "One straight vertical stroke, sometimes with a short slanted flag at the top or a flat foot.",
        "No, it encloses nothing.",
        "A vertical line, perhaps with a small hook to the left.",
        "A vertical line that runs straight down, perhaps onto a short horizontal base.",
        "The left and the right side are empty.",
    ],
    "two": [
        "A swan's neck on a flat base.",
        "A curved stroke over the top to the right, a slanted stroke down to the left, "
        "a horizontal stroke to the right.",
        "No, or only a tiny loop at the lower left corner.",
        "A round arch that is open to the left and below.",
        "A slanted line that ends in a flat horizontal base.",
        "The middle of the left side and the lower right above the base are empty.",
    ],
    "three": [
        "Two bumps, one above the other, both open to the left.",
        "Two curved strokes that bulge to the right and meet in the middle.",
        "No, both bumps are open on the left side.",
        "A round arch that bulges to the right and is open to the left.",
        "A round bowl that bulges to the right and is open to the left.",
        "The left side is empty between the ends of the strokes.",
    ],
    "four": [
        "A corner or a triangle on a tall upright bar.",
        "A slanted stroke down to the left, a horizontal stroke to the right, "
        "and a straight vertical stroke across it.",
        "Sometimes a small triangle, when the top is closed.",
        "Two lines that rise and are open above or meet in a point.",
        "A vertical line alone, right of the centre.",
        "The lower left corner is empty.",
    ],
    "five": [
        "A flat roof over an open round belly.",
        "A horizontal stroke at the top, a short vertical stroke down on the left, "
        "a curved stroke that bulges to the right.",
        "No, the belly is open to the left.",
        "A flat horizontal line with a corner on the left side.",
        "A round bowl that bulges to the right and is open to the left.",
        "The upper right below the roof and the lower left are empty.",
    ],
    "six": [
        "A curved stem that ends in a ring at the bottom.",
        "One continuous curved stroke down the left side that closes into a loop.",
        "Yes, one hole in the lower half.",
        "A slanted or curved line on the left side, nothing to its right.",
        "A closed round ring.",
        "The upper right corner is empty.",
    ],
    "seven": [
        "A flat roof on a slanted leg.",
        "A horizontal stroke at the top and a straight slanted stroke down to the left, "
        "sometimes with a short bar across.",
        "No, it encloses nothing.",
        "A flat horizontal line with a corner on the right side.",
        "A slanted line alone that runs down to the left.",
        "The lower right and the left side are empty.",
    ],
    "eight": [
        "Two closed rings, one above the other.",
        "One continuous curved stroke that crosses itself in the middle.",
        "Yes, two holes, one in the upper and one in the lower half.",
        "A closed round ring.",
        "A closed round ring.",
        "The left and the right side of the narrow waist are empty.",
    ],
    "nine": [
        "A ring at the top with a stem below it.",
        "A curved stroke that closes into a loop, then a straight or curved stroke down on the right side.",
        "Yes, one hole in the upper half.",
        "A closed round ring.",
        "A vertical or slightly curved line on the right side.",
        "The lower left corner is empty.",
    ],
}
