"""Names and templates of ImageNet's classes that ship with open_clip; read when they are needed."""


def imagenet_names() -> tuple[str, ...]:
    """A name of each of the 1,000 classes, in the order of their WordNet ids."""
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates, each with ``{}`` for the name."""
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
