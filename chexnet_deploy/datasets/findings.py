"""The 14 findings of ChestX-ray14 in the one canonical order.

The order is CheXNet's (Rajpurkar et al. 2017, table 2). Other projects use other orders with the same names, so every
bundle names its own, and readers of a bundle ask by name, never by index.
"""

from typing import Final

FINDINGS: Final = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)

NO_FINDING: Final = "No Finding"
"""What the official tables write where none of the 14 is present."""
