"""The tiny world: pictures and clips of coloured shapes, a checker, and the small models that were trained on them."""
