"""From (candidates, objects) to an assignment: one-to-one (Hungarian) and one-to-many (ATSS, maximum IoU).

The one-to-many assigners return, per image and candidate, the index of its object, or one of these two.
"""

BACKGROUND = -1
IGNORED = -2
