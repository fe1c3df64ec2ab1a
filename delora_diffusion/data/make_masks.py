"""Masks for a folder of photos, made by rembg: the subject white, what is behind it black."""

from __future__ import annotations

import logging
from pathlib import Path

from ..atomic import complete_file
from ..errors import MissingExtraError
from .config import MasksConfig
from .image_files import MASK, DataError, find_images, load_image, masks_among

log = logging.getLogger(__name__)


def make_masks(config: MasksConfig) -> list[Path]:
    """Write a mask beside each photo that has none; returns those written.

    Raises:
        DataError: no photos, one that cannot be read, or one in which nothing is found.
        MissingExtraError: rembg is not installed; the message names the extra.
    """
    folder = Path(config.folder)
    photos = find_images(folder, option="folder")
    try:
        from rembg import new_session, remove
    except ImportError as error:
        raise MissingExtraError('delora masks needs rembg: pip install "delora_diffusion[masks]"') from error
    there = masks_among(folder.iterdir())
    wanted = [photo for photo in photos if config.overwrite or photo not in there]
    session = new_session(config.model) if wanted else None
    written, empty = [], []
    for photo in wanted:
        mask = remove(load_image(photo), session=session, only_mask=True).convert("L")
        if not mask.getextrema()[1]:
            empty.append(photo.name)
            continue
        path = photo.with_name(f"{photo.stem}{MASK}.png")
        with complete_file(path) as aside:
            mask.save(aside)
        written.append(path)
    log.info("%s: %d masks made, %d were there", folder, len(written), len(photos) - len(wanted))
    if empty:
        raise DataError(
            f"{config.model} found nothing to keep in {', '.join(empty)}; paint their masks by hand (white is what "
            f"counts), or try another --model, e.g. isnet-general-use"
        )
    return written
