# SPDX-License-Identifier: Apache-2.0
"""Registered depth and masks -> points, centroids and oriented boxes, in metres.

Everything is in the camera's optical frame (REP-103): x right, y down, z forward. Depth is measured along z, NaN or
anything not above 0 = not measured. One camera sees only the near side of things: a centroid lies on it, a box that
stands on its support reaches down to it, and what is hidden behind stays unknown.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

MOST_SAMPLES = 3000  # points of an object that its box is made of; more change it by less than the sensor's noise
FEWEST_POINTS = 12  # below that there is no box
STRAY_GAP_M, STRAY_GAP_SHARE = 0.02, 0.03  # a gap in depth that separates two things: the larger, share of the depth
TRIM = 0.5  # per cent cut off at both ends of every extent: single pixels must not blow up a box

SUPPORT_HYPOTHESES = 64
SUPPORT_SAMPLES = 600
SUPPORT_SHARE = 0.35  # of the surroundings must lie in one plane for it to be a support
SUPPORT_NOISE_M, SUPPORT_NOISE_SHARE = 0.004, 0.006  # distance from a plane that is noise: the larger, share of depth
# What stands on a plane comes this near to it, the largest of: a length, a share of the height of its top (the lowest
# point of a ball that a camera sees is well above its foot), and, seen from above, its own width.
STANDING_M, STANDING_SHARE, FROM_ABOVE = 0.03, 0.5, 0.8  # the last: cosine between the line of sight and the normal
STEADY_YAW = 0.15  # a box turned by 45 degrees must be this share smaller to be preferred: round things keep still


@dataclass(frozen=True)
class OrientedBox:
    """A box around what is visible of an object.

    z is the normal of the surface that it stands on, where there is one, else the axis nearest to up in the image; x
    is the axis nearest to the image's right.
    """

    centre_m: Float[np.ndarray, " 3"]
    axes: Float[np.ndarray, "3 3"]  # columns: the directions of the box's x, y, z; right-handed
    size_m: Float[np.ndarray, " 3"]  # full lengths along them


@dataclass(frozen=True)
class Plane:
    """Points p with normal . p = offset_m."""

    normal: Float[np.ndarray, " 3"]  # unit length; the camera is on its positive side
    offset_m: float

    def heights_m(self, points_m: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " n"]:
        return points_m @ self.normal - self.offset_m


@dataclass(frozen=True)
class ObjectGeometry:
    """Where an object is."""

    centroid_m: Float[np.ndarray, " 3"]  # mean of its visible points
    box: OrientedBox
    support: Plane | None  # what it stands on; None where no such surface was found
    depth_px: int  # pixels of the mask whose depth was measured


@dataclass(frozen=True)
class Cloud:
    """Points with what the camera saw there."""

    points_m: Float[np.ndarray, "n 3"]  # float32
    rgb_u8: UInt8[np.ndarray, "n 3"]
    labels: UInt8[np.ndarray, " n"]  # instance ids; 0 = none


def pinhole_rays(
    fx: float, fy: float, cx: float, cy: float, width: int, height: int
) -> Float[np.ndarray, "{height} {width} 2"]:
    """x / z and y / z of what each pixel sees, float32. (cx, cy) counts from the centre of the first pixel."""
    x = (np.arange(width) - cx) / fx
    y = (np.arange(height) - cy) / fy
    return np.stack(np.broadcast_arrays(x[None, :], y[:, None]), axis=2).astype(np.float32)


def measured(depth_m: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where there is a depth at all."""
    with np.errstate(invalid="ignore"):
        return (depth_m > 0.0) & (depth_m < np.inf)


def resize_nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels nearest to those of a grid of another size; the one way to resize ids. (h, w[, c]) of any dtype."""
    if image.shape[:2] == (height, width):
        return image
    rows = ((np.arange(height) + 0.5) * image.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * image.shape[1] / width).astype(np.intp)
    return image[rows[:, None], columns[None, :]]


def grow(mask: Bool[np.ndarray, "h w"], margin_px: int) -> Bool[np.ndarray, "h w"]:
    """The mask and what lies within `margin_px` rows and columns of it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if margin_px == 0 or rows.size == 0:
        return mask
    grown = np.zeros_like(mask)
    top, bottom = max(0, rows[0] - margin_px), rows[-1] + margin_px + 1
    left, right = max(0, columns[0] - margin_px), columns[-1] + margin_px + 1
    region = mask[top:bottom, left:right]
    for axis in (0, 1):
        region = _any_within(region, margin_px, axis)
    grown[top:bottom, left:right] = region
    return grown


def _any_within(mask: Bool[np.ndarray, "h w"], reach: int, axis: int) -> Bool[np.ndarray, "h w"]:
    length = mask.shape[axis]
    pad = [(0, 0), (0, 0)]
    pad[axis] = (1, 0)
    count = np.pad(np.cumsum(mask, axis=axis, dtype=np.int32), pad)
    index = np.arange(length)
    above = np.take(count, np.minimum(index + reach + 1, length), axis=axis)
    below = np.take(count, np.maximum(index - reach, 0), axis=axis)
    return above > below


def back_project(
    depth_m: Float[np.ndarray, "h w"], rays: Float[np.ndarray, "h w 2"], pixels: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n 3"]:
    """The points that the pixels (indices into the flattened image, with a measured depth) see, float32."""
    points = np.empty((len(pixels), 3), np.float32)
    # By row and column: a part of an image would have to be copied to be flat.
    at = np.divmod(pixels, depth_m.shape[1])
    points[:, 2] = depth_m[at]
    points[:, :2] = rays[at] * points[:, 2:]
    return points


def object_cloud(
    depth_m: Float[np.ndarray, "h w"],
    rays: Float[np.ndarray, "h w 2"],
    ids: UInt8[np.ndarray, "h w"],
    image_rgb_u8: UInt8[np.ndarray, "h w 3"],
) -> Cloud:
    """Every measured point of every object, labelled with its id."""
    return _cloud(depth_m, rays, ids, image_rgb_u8, np.flatnonzero((ids > 0) & measured(depth_m)))


def surroundings_cloud(
    depth_m: Float[np.ndarray, "h w"],
    rays: Float[np.ndarray, "h w 2"],
    ids: UInt8[np.ndarray, "h w"],
    image_rgb_u8: UInt8[np.ndarray, "h w 3"],
    excluded: Bool[np.ndarray, "h w"],
    *,
    every_px: int = 1,
) -> Cloud:
    """Every measured point but the excluded ones, of every `every_px`-th row and column."""
    grid = (slice(every_px // 2, None, every_px),) * 2
    kept = measured(depth_m[grid]) & ~excluded[grid]
    return _cloud(depth_m[grid], rays[grid], ids[grid], image_rgb_u8[grid], np.flatnonzero(kept))


def _cloud(
    depth_m: Float[np.ndarray, "h w"],
    rays: Float[np.ndarray, "h w 2"],
    ids: UInt8[np.ndarray, "h w"],
    image_rgb_u8: UInt8[np.ndarray, "h w 3"],
    pixels: Int[np.ndarray, " n"],
) -> Cloud:
    points = back_project(depth_m, rays, pixels)
    return Cloud(points, image_rgb_u8.reshape(-1, 3)[pixels], ids.reshape(-1)[pixels])


def object_geometry(
    depth_m: Float[np.ndarray, "h w"],
    rays: Float[np.ndarray, "h w 2"],
    mask: Bool[np.ndarray, "h w"],
    others: Bool[np.ndarray, "h w"] | None = None,
) -> ObjectGeometry | None:
    """Where the object under the mask is; None when too few of its pixels have a depth.

    Points behind or before its main body (the mask's rim often looks past the object) are left out.

    Args:
        others: pixels that belong to other objects; they are no support.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    # The object and half its size around it: small enough to be quick, large enough to see what it stands on.
    high, wide = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    around_px = max(6, int(max(high, wide)) // 2)
    view = (
        slice(max(0, rows[0] - around_px), rows[-1] + around_px + 1),
        slice(max(0, columns[0] - around_px), columns[-1] + around_px + 1),
    )
    depth_m, rays, mask = depth_m[view], rays[view], mask[view]
    is_measured = measured(depth_m)
    pixels = np.flatnonzero(mask & is_measured)
    if len(pixels) < FEWEST_POINTS:
        return None
    depth_px = len(pixels)
    points = without_strays(back_project(depth_m, rays, _thinned(pixels, MOST_SAMPLES)))
    if len(points) < FEWEST_POINTS:
        return None

    taken = grow(mask, 2) if others is None else grow(mask, 2) | others[view]
    ground = back_project(depth_m, rays, _thinned(np.flatnonzero(is_measured & ~taken), SUPPORT_SAMPLES))
    support = support_plane(ground, points)
    return ObjectGeometry(
        centroid_m=points.mean(axis=0, dtype=np.float64),
        box=box_on_plane(points, support) if support is not None else smallest_box(points),
        support=support,
        depth_px=depth_px,
    )


def _thinned(pixels: Int[np.ndarray, " n"], most: int) -> Int[np.ndarray, " m"]:
    """At most `most` of the pixels, evenly spread."""
    if len(pixels) <= most:
        return pixels
    return pixels[(np.arange(most) * (len(pixels) / most)).astype(np.intp)]


def without_strays(points_m: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "m 3"]:
    """The points of the largest body: those that no gap in depth separates from it."""
    depth_m = points_m[:, 2]
    nearest, farthest = float(depth_m.min()), float(depth_m.max())
    gap_m = max(STRAY_GAP_M, STRAY_GAP_SHARE * float(np.median(depth_m)))
    bins = int((farthest - nearest) / gap_m) + 1
    if bins < 3:
        return points_m
    number = np.minimum(((depth_m - nearest) / gap_m).astype(np.intp), bins - 1)
    count = np.bincount(number, minlength=bins)
    # A few pixels float between two surfaces where the sensor has mixed both; they are no bridge.
    is_filled = count > 0.2 * len(points_m) / bins
    body = np.cumsum(np.diff(is_filled, prepend=False) & is_filled) * is_filled  # 0 = gap, else number of the body
    sizes = np.bincount(body, weights=count)
    sizes[0] = 0.0
    return points_m[body[number] == int(sizes.argmax())]


def support_plane(ground_m: Float[np.ndarray, "g 3"], object_m: Float[np.ndarray, "n 3"]) -> Plane | None:
    """The plane among the points around an object that the object stands on, on the camera's side.

    RANSAC with a fixed seed: equal points give equal planes.
    """
    if len(ground_m) < FEWEST_POINTS:
        return None
    ground, thing = ground_m.astype(np.float64), _every(object_m, 200).astype(np.float64)
    noise_m = max(SUPPORT_NOISE_M, SUPPORT_NOISE_SHARE * float(np.median(ground[:, 2])))
    corners = ground[np.random.default_rng(0).integers(len(ground), size=(SUPPORT_HYPOTHESES, 3))]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1)
    is_triangle = length > 1e-9
    if not is_triangle.any():
        return None
    normals = normals[is_triangle] / length[is_triangle, None]
    offsets = (normals * corners[is_triangle, 0]).sum(axis=1)
    normals, offsets = normals * -np.sign(offsets)[:, None], -np.abs(offsets)  # the camera, 0, is above the plane

    share = (np.abs(ground @ normals.T - offsets) < noise_m).mean(axis=0)
    # Three points make a rough plane: below it, the object may seem to be three times as deep as noise allows.
    share[~_stands_on(thing, normals, offsets, 3 * noise_m)] = 0.0
    best = int(share.argmax())
    if share[best] < SUPPORT_SHARE:
        return None
    plane = _refined(ground, Plane(normals[best], float(offsets[best])), noise_m)
    if plane is None or not _stands_on(thing, plane.normal[None], np.array([plane.offset_m]), noise_m)[0]:
        return None
    return plane


def _refined(ground: Float[np.ndarray, "g 3"], plane: Plane, noise_m: float) -> Plane | None:
    near = ground[np.abs(plane.heights_m(ground)) < noise_m]
    centre = near.mean(axis=0)
    normal = np.linalg.eigh((near - centre).T @ (near - centre))[1][:, 0]
    offset = float(normal @ centre)
    if offset == 0.0:  # the plane holds the camera: it sees no side of it
        return None
    return Plane(-normal * np.sign(offset), -abs(offset))


def _stands_on(
    points_m: Float[np.ndarray, "n 3"],
    normals: Float[np.ndarray, "k 3"],
    offsets_m: Float[np.ndarray, " k"],
    noise_m: float,
) -> Bool[np.ndarray, " k"]:
    """On which of the planes the object can stand."""
    lowest, middle, top = np.percentile(points_m @ normals.T - offsets_m, (2, 50, 98), axis=0)
    centre = points_m.mean(axis=0)
    flat = points_m - centre
    width_m = 2.8 * np.sqrt(np.maximum((flat**2).sum() - ((flat @ normals.T) ** 2).sum(axis=0), 0) / len(flat))
    is_from_above = -(normals @ centre) > FROM_ABOVE * np.linalg.norm(centre)  # then its sides are hidden
    may_hover_m = np.maximum(STANDING_M, STANDING_SHARE * top)
    may_hover_m = np.where(is_from_above, np.maximum(may_hover_m, width_m), may_hover_m)  # 2.8 rms: a disc's diameter
    return (lowest > -3 * noise_m) & (lowest < may_hover_m) & (middle > noise_m / 2)


def _every(points_m: Float[np.ndarray, "n 3"], most: int) -> Float[np.ndarray, "m 3"]:
    return points_m[_thinned(np.arange(len(points_m)), most)]


def box_on_plane(points_m: Float[np.ndarray, "n 3"], plane: Plane) -> OrientedBox:
    """The smallest box on the plane that holds the points and reaches down to it."""
    axes, low, high = _smallest_around(points_m.astype(np.float64), plane.normal)
    low[2] = min(plane.offset_m, high[2])  # along the normal: the plane itself
    return _box(axes, low, high)


def smallest_box(points_m: Float[np.ndarray, "n 3"]) -> OrientedBox:
    """The smallest box around the points with one of their principal axes among its own."""
    points = _every(points_m, 1000).astype(np.float64)
    centred = points - points.mean(axis=0)
    principal = np.linalg.eigh(centred.T @ centred)[1].T
    found = [_smallest_around(points, axis) for axis in principal]
    volumes = [float(np.prod(np.maximum(high - low, 1e-4))) for _, low, high in found]
    axes, low, high = found[int(np.argmin(volumes))]
    order, signs = _facing(axes)
    low, high = low[order], high[order]
    low, high = np.where(signs > 0, low, -high), np.where(signs > 0, high, -low)
    return _box(axes[:, order] * signs, low, high)


def _facing(axes: Float[np.ndarray, "3 3"]) -> tuple[Int[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Order and signs of a box's axes: z is the one nearest to up in the image, x the one nearest to its right."""
    up = int(np.abs(axes[1]).argmax())
    right = max((k for k in range(3) if k != up), key=lambda k: abs(axes[0, k]))
    order = np.array([right, 3 - up - right, up])
    signs = np.array([1.0 if axes[0, right] >= 0 else -1.0, 1.0, 1.0 if axes[1, up] <= 0 else -1.0])
    if np.linalg.det(axes[:, order] * signs) < 0:
        signs[1] = -1.0
    return order, signs


def _smallest_around(
    points: Float[np.ndarray, "n 3"], up: Float[np.ndarray, " 3"]
) -> tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, " 3"], Float[np.ndarray, " 3"]]:
    """Axes (columns) with z = up that make the smallest box, and the extents along them."""
    right = np.array([1.0, 0.0, 0.0]) - up[0] * up
    if np.linalg.norm(right) < 1e-3:  # up is the image's right: then its down serves
        right = np.array([0.0, 1.0, 0.0]) - up[1] * up
    right /= np.linalg.norm(right)
    flat = points @ np.stack([right, np.cross(up, right)], axis=1)
    few = flat[_thinned(np.arange(len(flat)), 600)]

    yaw = _best_yaw(few, np.radians(np.arange(-44.0, 45.1, 2.0)))
    yaw = _best_yaw(few, yaw + np.radians(np.arange(-2.0, 2.1, 0.25)))
    x = np.cos(yaw) * right + np.sin(yaw) * np.cross(up, right)
    axes = np.stack([x, np.cross(up, x), up], axis=1)
    low, high = np.percentile(points @ axes, (TRIM, 100 - TRIM), axis=0)
    return axes, low, high


def _best_yaw(flat: Float[np.ndarray, "n 2"], yaws: Float[np.ndarray, " k"]) -> float:
    cos, sin = np.cos(yaws), np.sin(yaws)
    along, across = flat @ np.stack([cos, sin]), flat @ np.stack([-sin, cos])
    area = np.ptp(along, axis=0) * np.ptp(across, axis=0)
    area = area * (1.0 + STEADY_YAW * np.abs(yaws) / (np.pi / 4)) + 1e-12 * np.abs(yaws)
    return float(yaws[int(area.argmin())])


def _box(axes: Float[np.ndarray, "3 3"], low: Float[np.ndarray, " 3"], high: Float[np.ndarray, " 3"]) -> OrientedBox:
    return OrientedBox(centre_m=axes @ ((low + high) / 2), axes=axes, size_m=high - low)


def quaternion_xyzw(axes: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, " 4"]:
    """The rotation whose matrix is `axes` (right-handed, orthonormal columns); w >= 0."""
    m = axes
    # The largest of the four components is found first: dividing by a small one would lose digits.
    diagonal = np.array(
        [
            1 + m[0, 0] - m[1, 1] - m[2, 2],
            1 - m[0, 0] + m[1, 1] - m[2, 2],
            1 - m[0, 0] - m[1, 1] + m[2, 2],
            1 + m[0, 0] + m[1, 1] + m[2, 2],
        ]
    )
    x = (diagonal[0], m[1, 0] + m[0, 1], m[0, 2] + m[2, 0], m[2, 1] - m[1, 2])
    y = (m[1, 0] + m[0, 1], diagonal[1], m[2, 1] + m[1, 2], m[0, 2] - m[2, 0])
    z = (m[0, 2] + m[2, 0], m[2, 1] + m[1, 2], diagonal[2], m[1, 0] - m[0, 1])
    w = (m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1], diagonal[3])
    quaternion = np.array((x, y, z, w)[int(diagonal.argmax())])
    quaternion /= np.linalg.norm(quaternion)
    return -quaternion if quaternion[3] < 0 else quaternion
