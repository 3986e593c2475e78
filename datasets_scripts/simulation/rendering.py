"""Cameras of a MuJoCo scene: colors, exact depth, the body in each pixel, and poses; the choice of OpenGL.

The world frame is MuJoCo's. Camera frames have x to the right and y down in the image, z forward, in meters.
Pixel coordinates count from the outer edge of the image: the center of the first pixel is at 0.5.
"""

import contextlib
import os
import sys
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["RenderedScene", "check_cameras", "check_image_size", "choose_renderer", "rendering_advice"]


def choose_renderer() -> None:
    """Pick software rendering on Linux, which needs neither a display nor a GPU; keep the user's choice."""
    if sys.platform.startswith("linux") and "PYOPENGL_PLATFORM" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "osmesa")
        # Mesa would start a thread per core for each renderer, which makes small scenes slower.
        os.environ.setdefault("LP_NUM_THREADS", "0")


def check_cameras(cameras: Sequence[str], known: Collection[str]) -> list[str]:
    """The cameras as a list; raises a `ValueError` if one is unknown or given twice, or there is none."""
    unknown = [camera for camera in cameras if camera not in known]
    if unknown:
        raise ValueError(f"unknown camera '{unknown[0]}'; the simulator has {', '.join(known)}")
    if not cameras or len(set(cameras)) != len(cameras):
        raise ValueError(
            f"cameras are {','.join(cameras) or 'empty'}; name each of them once, the main view first"
        )
    return list(cameras)


def check_image_size(side: int) -> None:
    """Raise a `ValueError` if images would be too small to show anything."""
    if side < 16:
        raise ValueError(f"image size is {side} px; it must be at least 16")


def rendering_advice(error: Exception) -> str:
    """What to do when MuJoCo cannot render."""
    return (
        f"MuJoCo cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')} ({error}); install the "
        "software renderer (Debian and Ubuntu: `apt-get install libosmesa6`), "
        "or set MUJOCO_GL=egl on a machine with a GPU"
    )


class RenderedScene(contextlib.AbstractContextManager):
    """The cameras of a MuJoCo model, in square images.

    In software a drawing takes nearly all of a simulator's time. `mujoco.Renderer` makes one each for depth
    and bodies; here both come from one. Several scenes may live in one process if they are used from one
    thread; close them when done.

    Args:
        model, data: MuJoCo's `MjModel` and `MjData`, which are drawn as they are then.
        views (`Mapping[str, str]`): Names of views -> cameras of the model.
        image_size (`int`): Side of the images in pixels.
        upside_down (`Sequence[str]`): Views whose camera is mounted so, and whose images are turned.
        hidden_groups (`Sequence[int]`): Groups of geoms that are not drawn.

    Raises:
        RuntimeError: If the rendering library fails.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        views: Mapping[str, str],
        image_size: int,
        upside_down: Sequence[str] = (),
        hidden_groups: Sequence[int] = (),
    ):
        import mujoco

        self._mujoco, self._model, self._data = mujoco, model, data
        self._views, self._upside_down, self.image_size = views, upside_down, image_size
        # Images larger than the model's need a larger frame buffer.
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = (
            max(side, image_size) for side in (buffer.offwidth, buffer.offheight)
        )
        self._options = mujoco.MjvOption()
        for group in hidden_groups:
            self._options.geomgroup[group] = 0
        self._drawn = mujoco.MjvScene(model, maxgeom=10000)
        try:
            window = mujoco.GLContext(image_size, image_size)
            window.make_current()
            context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:  # OpenGL raises many types
            raise RuntimeError(rendering_advice(error)) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)
        context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # more exact far away
        self._window, self._context = window, context
        # Also when the interpreter exits, where MuJoCo's own clean-up comes too late and fails.
        self._free_renderer = weakref.finalize(self, _free_renderer, window, context)

    def render_rgb(self, view: str) -> np.ndarray:
        """RGB image: `(H, W, 3)` uint8, upright."""
        return self._draw(view, ())[0]

    def render_geometry(self, view: str) -> tuple[np.ndarray, np.ndarray]:
        """Depth and bodies.

        Returns:
            `tuple`: Distance along the optical axis `(H, W)` float32 meters, where empty background is beyond
            100 m, and the rigid body that each pixel shows, `(H, W)` int32, -1 for background and markers.
        """
        flags = self._mujoco.mjtRndFlag
        colors, buffer = self._draw(view, (flags.mjRND_SEGMENT, flags.mjRND_IDCOLOR))
        planes = self._model.vis.map
        near, far = planes.znear * self._model.stat.extent, planes.zfar * self._model.stat.extent
        # The buffer holds near (far - z) / (z (far - near)).
        depth_m = near * far / (near + buffer.astype(np.float64) * (far - near))
        numbers = colors.astype(np.int32) @ (1, 2**8, 2**16)  # (H, W), 0 for background
        body_of_number = np.full(self._drawn.ngeom + 1, -1, np.int32)
        for geom in self._drawn.geoms[: self._drawn.ngeom]:
            if geom.segid >= 0 and geom.objtype == self._mujoco.mjtObj.mjOBJ_GEOM:
                body_of_number[geom.segid + 1] = self._model.geom_bodyid[geom.objid]
        return depth_m.astype(np.float32), body_of_number[numbers]

    def render_depth(self, view: str) -> np.ndarray:
        """The depth of [`render_geometry`]."""
        return self.render_geometry(view)[0]

    def body_poses(self) -> tuple[np.ndarray, np.ndarray]:
        """World poses of all rigid bodies: positions `(bodies, 3)` meters, rotations `(bodies, 3, 3)`."""
        return self._data.xpos.copy(), self._data.xmat.reshape(-1, 3, 3).copy()

    def camera_pose(self, view: str) -> tuple[np.ndarray, np.ndarray]:
        """Pose of a camera now.

        Returns:
            `tuple`: Position `(3,)` in meters and rotation `(3, 3)`, whose columns are the camera's x
            (right), y (down) and z (forward) axes in the world frame.
        """
        camera = self._data.camera(self._views[view])
        return camera.xpos.copy(), camera.xmat.reshape(3, 3) @ self._image_axes(view)

    def intrinsics(self, view: str) -> dict[str, float]:
        """Pinhole intrinsics in pixels: fx, fy, cx, cy, height, width (edge-based pixel coordinates)."""
        half_angle = np.deg2rad(self._model.camera(self._views[view]).fovy[0]) / 2
        side = self.image_size
        focal, center = float(0.5 * side / np.tan(half_angle)), 0.5 * side
        return {"fx": focal, "fy": focal, "cx": center, "cy": center, "height": side, "width": side}

    def close(self) -> None:
        """Free the renderer."""
        self._free_renderer()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _image_axes(self, view: str) -> np.ndarray:
        """Right, down and forward in the frame of a camera of MuJoCo, as columns."""
        # MuJoCo's cameras look along -z with y up; turning the image by 180 degrees turns x and y.
        return np.diag([-1.0, 1.0, -1.0]) if view in self._upside_down else np.diag([1.0, -1.0, -1.0])

    def _draw(self, view: str, flags: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """What is drawn `(H, W, 3)` uint8, and the depth buffer `(H, W)` float32."""
        mujoco, side = self._mujoco, self.image_size
        camera, everything = mujoco.MjvCamera(), mujoco.mjtCatBit.mjCAT_ALL
        camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        camera.fixedcamid = self._model.camera(self._views[view]).id
        mujoco.mjv_updateScene(self._model, self._data, self._options, None, camera, everything, self._drawn)
        usual = self._drawn.flags.copy()
        for flag in flags:
            self._drawn.flags[flag] = 1
        if flags:
            for geom in self._drawn.geoms[: self._drawn.ngeom]:
                if geom.rgba[3] <= 0:
                    geom.segid = -1  # not drawn: where bodies are drawn, nothing is transparent
        self._window.make_current()
        area = mujoco.MjrRect(0, 0, side, side)
        mujoco.mjr_render(area, self._drawn, self._context)
        self._drawn.flags[:] = usual
        colors, buffer = np.empty((side, side, 3), np.uint8), np.empty((side, side), np.float32)
        mujoco.mjr_readPixels(colors, buffer, area, self._context)
        # OpenGL starts with the lowest row.
        turn = np.s_[:, ::-1] if view in self._upside_down else np.s_[::-1]
        return np.ascontiguousarray(colors[turn]), np.ascontiguousarray(buffer[turn])


def _free_renderer(window: Any, context: Any) -> None:
    # What is freed, by number, belongs to the current window, which may be that of another renderer.
    window.make_current()
    context.free()
    window.free()
