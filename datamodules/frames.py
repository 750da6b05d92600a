"""Images and calibration of one key-frame: what the car can see at t0, and nothing more."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import torch

from datamodules.ego_state import can_bus_vector
from datamodules.image_geometry import Image, ImageGeometry
from datamodules.lidar import no_points, one_row, read_sweep
from datamodules.records import FrameRecord, Index
from odvla.errors import UserError
from odvla.types import CAMERAS, Cameras, Frames, LidarPoints

log = logging.getLogger(__name__)
JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
# libjpeg can decode at 1/2, 1/4 or 1/8 of the size, several times faster than in full.
REDUCED_FLAGS = (
    (8, cv2.IMREAD_REDUCED_COLOR_8),
    (4, cv2.IMREAD_REDUCED_COLOR_4),
    (2, cv2.IMREAD_REDUCED_COLOR_2),
)


def load_image(
    path: Path, file_size: tuple[int, int], size: tuple[int, int], *, strict_size: bool = False
) -> Image:
    """Read one camera image and resize it.

    Args:
        path: a JPEG or PNG file.
        file_size: width, height the tables give for the file.
        size: width, height wanted.
        strict_size: the decoded file must have file_size (which only a full decode can tell).

    Returns:
        RGB uint8 [height, width, 3].

    Raises:
        UserError: the file is missing, cut short, not an image, or (if asked for) of another size.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"camera image {path} cannot be read: {error.strerror}") from error
    # OpenCV fills the missing part of a cut JPEG with grey and says nothing.
    if content[:2] == JPEG_START and not content.rstrip(b"\x00").endswith(JPEG_END):
        raise UserError(f"camera image {path} is cut short ({len(content)} bytes, no end marker)")
    flag = cv2.IMREAD_COLOR
    for factor, reduced in REDUCED_FLAGS:
        if file_size[0] >= factor * size[0] and file_size[1] >= factor * size[1]:
            flag = reduced
            break
    decoded = None
    if content:
        decoded = cv2.imdecode(
            np.frombuffer(content, np.uint8), flag | cv2.IMREAD_IGNORE_ORIENTATION
        )
    if decoded is None:
        raise UserError(f"camera image {path} is not an image OpenCV can decode")
    if strict_size and decoded.shape[1::-1] != file_size:
        width, height = decoded.shape[1::-1]
        raise UserError(
            f"camera image {path} is not of the size the tables give: {width}x{height}, not "
            f"{file_size[0]}x{file_size[1]}"
        )
    if decoded.shape[1::-1] != size:
        shrinking = decoded.shape[1] > size[0]
        method = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        decoded = cv2.resize(decoded, size, interpolation=method)
    return np.ascontiguousarray(cv2.cvtColor(decoded, cv2.COLOR_BGR2RGB), dtype=np.uint8)


# Of frames that nobody is to look at.
_NO_CALIBRATION = Cameras(torch.zeros(1, len(CAMERAS), 3, 3), torch.zeros(1, len(CAMERAS), 4, 4))


class BrokenImages:
    """Images that could not be read: named once each, counted, and too many stop the run.

    The count is shared by the workers of a data loader; a file that two of them meet counts twice.

    Args:
        budget: how many may be broken; 0: the first one stops the run.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._count = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        """Broken images met so far."""
        return int(self._count)

    def add(self, file: str, error: UserError) -> None:
        """One more.

        Raises:
            UserError: it is one too many.
        """
        if self.budget == 0:
            raise error
        if file in self._seen:
            return
        self._seen.add(file)
        self._count += 1
        if self.count > self.budget:
            raise UserError(
                f"{error}; this is broken image {self.count}, data.broken_images allows "
                f"{self.budget}"
            ) from error
        log.warning("%s; its key-frame is left out (%d so far)", error, self.count)


class FrameLoader:
    """Turns FrameRecords into Frames of one row.

    Args:
        index: the root's index.
        geometry: of the images the model gets; (width, height): they are resized only.
        cache_limit_gb: decoded images are kept in memory up to this many gigabytes a process;
            0 keeps none.
        broken_images: how many images may be missing or broken before the run stops.
        lidar: read LIDAR_TOP's sweep of the key-frame, too.
    """

    def __init__(
        self,
        index: Index,
        geometry: ImageGeometry | tuple[int, int],
        cache_limit_gb: float = 0.0,
        broken_images: int = 0,
        *,
        lidar: bool = False,
    ) -> None:
        self.index = index
        self.lidar = lidar
        self.geometry = geometry if isinstance(geometry, ImageGeometry) else ImageGeometry(geometry)
        self.broken = BrokenImages(broken_images)
        frame_bytes = 3 * len(CAMERAS) * self.geometry.size[0] * self.geometry.size[1]
        self._cache_room = int(cache_limit_gb * 1e9 / frame_bytes)
        self._cache: dict[int, Image] = {}
        self._broken_frames: set[int] = set()

    def is_whole(self, frame: FrameRecord) -> bool:
        """Whether all images of a key-frame that was loaded here could be read."""
        return frame.number not in self._broken_frames

    def images(self, frame: FrameRecord) -> Image:
        """The six images [6, 3, h, w], RGB uint8; one that cannot be read is black.

        A key-frame with a black image is not `is_whole` from then on.

        Raises:
            UserError: an image cannot be read, and that is one too many.
        """
        if frame.number in self._cache:
            return self._cache[frame.number]
        width, height = self.geometry.size
        stack = np.empty((len(frame.cameras), 3, height, width), dtype=np.uint8)
        whole = True
        for number, camera in enumerate(frame.cameras):
            path = self.index.root / camera.file
            try:
                image = load_image(path, camera.size, self.geometry.resized)
            except UserError as error:
                self.broken.add(camera.file, error)
                image, whole = np.zeros((*self.geometry.resized[::-1], 3), np.uint8), False
            # Channel by channel: numpy would take five times as long to turn the axes round.
            for channel, plane in enumerate(cv2.split(self.geometry.crop_and_pad(image))):
                stack[number, channel] = plane
        if not whole:
            self._broken_frames.add(frame.number)
        if whole and len(self._cache) < self._cache_room:
            self._cache[frame.number] = stack
        return stack

    def load(
        self,
        frame: FrameRecord,
        *,
        scene_start: bool,
        blank: bool = False,
        unseen: bool = False,
    ) -> Frames:
        """One key-frame as a batch of one row.

        Args:
            frame: which.
            scene_start: temporal state must be forgotten before this frame; the motion in can_bus
                is zero then.
            blank: black images, nothing is read (rows that only fill up a batch).
            unseen: images of one pixel, which an encoder refuses, and no calibration: nobody is to
                look at them.

        Raises:
            UserError: an image or the sweep cannot be read.
        """
        width, height = self.geometry.size
        if unseen:
            images = np.zeros((len(CAMERAS), 3, 1, 1), np.uint8)
        elif blank:
            images = np.zeros((len(CAMERAS), 3, height, width), np.uint8)
        else:
            images = self.images(frame)
        return Frames(
            images=torch.from_numpy(images)[None],
            cameras=_NO_CALIBRATION if unseen else self.cameras(frame),
            lidar_to_global=torch.from_numpy(frame.lidar_to_global)[None],
            timestamp_s=torch.tensor([frame.timestamp_us * 1e-6], dtype=torch.float64),
            can_bus=torch.from_numpy(can_bus_vector(self.index, frame, scene_start))[None],
            scene_start=torch.tensor([scene_start]),
            sample_tokens=(frame.token,),
            lidar=self.sweep(frame, blank=blank or unseen) if self.lidar else None,
        )

    def sweep(self, frame: FrameRecord, *, blank: bool = False) -> LidarPoints:
        """The lidar's sweep at t0; see `load`."""
        if blank:
            return no_points()
        return one_row(read_sweep(self.index.root / frame.lidar_file))

    def cameras(self, frame: FrameRecord) -> Cameras:
        """Calibration of the images as the model gets them, each at its own exposure time."""
        intrinsics, transforms = [], []
        for camera in frame.cameras:
            intrinsics.append(self.geometry.matrix(camera.size) @ camera.intrinsics)
            transforms.append(camera.global_to_camera @ frame.lidar_to_global)
        return Cameras(
            intrinsics=torch.from_numpy(np.stack(intrinsics)).float()[None],
            lidar_to_cam=torch.from_numpy(np.stack(transforms)).float()[None],
        )
