"""Textured sheets, inks that can be read on them, and putting one on the other."""

from __future__ import annotations

import numpy as np


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """RGB in [0, 1], float32 (3,), of a hue in turns and a saturation and value in [0, 1]."""
    sector = (hue % 1.0) * 6
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + sector) % 6
        channels.append(value - value * saturation * max(0.0, min(k, 4 - k, 1.0)))
    return np.array(channels, dtype=np.float32)


def _value_noise(rng: np.random.Generator, side: int, cells_y: int, cells_x: int) -> np.ndarray:
    """Smooth noise in [0, 1], float32 (side, side): random values on a lattice, interpolated."""
    lattice = rng.random((cells_y + 1, cells_x + 1)).astype(np.float32)
    along = []
    for cells in (cells_y, cells_x):
        position = (np.arange(side) + 0.5) * (cells / side)
        index = np.floor(position).astype(np.int64)
        t = (position - index).astype(np.float32)
        along.append((index, t * t * (3 - 2 * t)))
    (iy, ty), (ix, tx) = along
    rows = lattice[iy] * (1 - ty[:, None]) + lattice[iy + 1] * ty[:, None]
    noise: np.ndarray = rows[:, ix] * (1 - tx) + rows[:, ix + 1] * tx
    return noise


def paint_background(rng: np.random.Generator, side: int, dark: bool) -> np.ndarray:
    """A textured sheet: colour gradient, clouds, perhaps fibres and ruled lines, and grain.

    Returns:
        float32 (side, side, 3), RGB in [0, 1] before clipping.
    """
    hue = float(rng.random())
    low, high = (0.12, 0.32) if dark else (0.74, 0.97)
    most_colour = 0.55 if dark else 0.32
    tones = [
        _hsv(
            hue + float(rng.uniform(-0.1, 0.1)),
            float(rng.uniform(0.04, most_colour)),
            float(rng.uniform(low, high)),
        )
        for _ in range(3)
    ]

    # From one tone to the second across the sheet, in a random direction.
    ramp = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    gy, gx = rng.uniform(-1, 1, size=2).astype(np.float32).tolist()
    gradient = np.clip(gy * ramp[:, None] + gx * ramp[None, :] + 0.5, 0, 1)
    # Clouds of the third: four octaves, each twice as fine and a bit more than half as strong.
    cells = int(rng.integers(2, 5))
    clouds = np.zeros((side, side), dtype=np.float32)
    for octave in range(4):
        n = min(cells * 2**octave, side)
        clouds += _value_noise(rng, side, n, n) * np.float32(0.5 * 0.55**octave)
    clouds = np.clip((clouds - 0.25) * float(rng.uniform(1.0, 2.2)), 0, 1)
    sheet = tones[0] + (tones[1] - tones[0]) * gradient[..., None]
    sheet = sheet + (tones[2] - sheet) * clouds[..., None]

    kind = int(rng.integers(4))
    if kind == 0:  # wood or brushed metal: noise stretched along one axis
        fine, coarse = max(8, side // 3), int(rng.integers(2, 6))
        fibres = _value_noise(
            rng, side, *((fine, coarse) if rng.random() < 0.5 else (coarse, fine))
        )
        sheet = sheet + (fibres[..., None] - 0.5) * np.float32(rng.uniform(0.06, 0.14))
    elif kind in (1, 2):  # ruled or squared paper, lying a bit askew
        tilt = float(rng.uniform(-0.12, 0.12))
        pitch = float(rng.uniform(9, 20))
        line = _hsv(hue + float(rng.uniform(-0.5, 0.5)), 0.5, 0.6)
        strength = np.float32(rng.uniform(0.15, 0.4))
        y, x = np.mgrid[:side, :side].astype(np.float32)
        for position in (y + tilt * x, x - tilt * y)[:kind]:
            phase = position + float(rng.uniform(0, pitch))
            distance = np.abs(phase - np.floor(phase / pitch) * pitch - pitch / 2)
            ruled = np.clip(1.2 - distance, 0, 1) * strength
            sheet = sheet + (line - sheet) * ruled[..., None]

    grain = rng.random((side, side, 1)).astype(np.float32) - np.float32(0.5)
    grained: np.ndarray = sheet + grain * np.float32(rng.uniform(0.02, 0.07))
    return grained


def pick_ink(rng: np.random.Generator, dark: bool) -> np.ndarray:
    """An ink that can be read: light on a dark sheet, dark or saturated on a light one."""
    hue = float(rng.random())
    if dark:
        return _hsv(hue, float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.8, 1.0)))
    return _hsv(hue, float(rng.uniform(0.5, 1.0)), float(rng.uniform(0.08, 0.5)))


def blend(
    canvas: np.ndarray, coverage: np.ndarray, ink: np.ndarray, top: int, left: int, opacity: float
) -> None:
    """Puts ink onto the canvas (in place) with its upper left corner at (top, left)."""
    height, width = coverage.shape
    area = canvas[top : top + height, left : left + width]
    area += (ink - area) * (coverage * np.float32(opacity))[..., None]
