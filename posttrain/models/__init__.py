"""Models: the upcycled decoder, reading and writing model folders, and the torch-free look at them.

Importing this package makes transformers' Auto classes know `model_type: upcycled`, whichever of the two is imported
first, and imports neither transformers nor torch itself.
"""

from __future__ import annotations

from posttrain.models.register import register_when_transformers_is_there

register_when_transformers_is_there()
