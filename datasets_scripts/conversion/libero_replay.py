"""Depth and tracks of LIBERO's demonstrations from the simulator: their states are set and shown one by one.

A file holds the model of each demonstration as XML, with paths of files on another machine, and
`states`, the simulator's state before each command. Images were stored after each command: frame k is shown
by state k + 1, and the last frame by none. robosuite had drawn it two simulation steps before that state.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

import numpy as np

from datasets_scripts.simulation.exact_labels import ExactLabels
from datasets_scripts.simulation.libero import FORMS, asset_folders
from datasets_scripts.simulation.rendering import RenderedScene

__all__ = ["ReplayedScene", "localize_model"]

STEPS_SINCE_IMAGE = 2
# Mean difference of 256 between a picture that is drawn again and the stored one, from which on they show
# different things. Renderers of CPUs and GPUs differ by less.
LARGEST_DIFFERENCE = 15.0


def localize_model(xml: str, where: str) -> str:
    """A stored model with the paths of this machine's meshes and textures.

    Raises:
        ValueError: If the XML is damaged, or a file does not exist here; begins with `where` and names it.
        RuntimeError: If LIBERO's simulator is missing.
    """
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise ValueError(f"{where}: its model_file is not XML ({error}); download the file again") from None
    libero, robosuite = asset_folders()
    for element in root.iter():
        for name, value in element.attrib.items():
            # Cube textures name up to six files.
            if not name.startswith("file") or element.tag not in ("mesh", "texture", "hfield"):
                continue
            parts = value.replace("\\", "/").split("/")
            if "assets" not in parts:
                raise ValueError(f"{where}: its model names {value}, which is in no folder of assets")
            last = len(parts) - parts[::-1].index("assets")
            folder = robosuite if "robosuite" in parts[:last] else libero
            path = folder.joinpath(*parts[last:]).resolve()
            if not path.is_file():
                needed = "/".join(parts[last:])
                raise ValueError(
                    f"{where}: its model needs {needed}, which {folder} does not have; install the "
                    "meshes of the version of LIBERO that made the file"
                )
            element.set(name, str(path))
    for compiler in root.iter("compiler"):
        for name in ("meshdir", "texturedir", "assetdir"):
            compiler.attrib.pop(name, None)  # the paths are absolute
    return ElementTree.tostring(root, encoding="unicode")


class ReplayedScene(RenderedScene):
    """The scene of a stored demonstration. Close it when done.

    Args:
        xml (`str`): Of [`localize_model`].
        image_size (`int`): Side of the square images in pixels.
        where (`str`): File and demonstration, for errors.

    Raises:
        ValueError: If MuJoCo does not take the model.
        RuntimeError: If the rendering library fails.
    """

    def __init__(self, xml: str, image_size: int, where: str):
        import mujoco

        try:
            model = mujoco.MjModel.from_xml_string(xml)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{where}: MuJoCo does not take its model ({reason})") from None
        # robosuite's marks at the gripper, which it hides.
        names = [model.site(number).name for number in range(model.nsite)]
        marks = [number for number, name in enumerate(names) if name.startswith(("robot", "gripper"))]
        model.site_rgba[marks, 3] = 0
        self.where = where
        super().__init__(
            model, mujoco.MjData(model), FORMS["converted"].views, image_size, hidden_groups=(0,)
        )

    def show(self, state: np.ndarray) -> None:
        """Show what robosuite drew before it came to a state `(1 + positions + velocities,)`."""
        model, data = self._model, self._data
        if state.shape != (1 + model.nq + model.nv,):
            raise ValueError(
                f"{self.where}: its states have {state.shape[0]} numbers, its model {1 + model.nq + model.nv}"
            )
        positions = state[1 : 1 + model.nq].copy()
        elapsed = STEPS_SINCE_IMAGE * model.opt.timestep
        self._mujoco.mj_integratePos(model, positions, state[1 + model.nq :], -elapsed)
        data.qpos[:] = positions
        self._mujoco.mj_kinematics(model, data)
        self._mujoco.mj_camlight(model, data)

    def label(
        self, states: Sequence[np.ndarray], pictures: dict[str, np.ndarray], depth_max_m: float
    ) -> ExactLabels:
        """Labels of frames with their states, one each.

        Args:
            states (`Sequence[np.ndarray]`): `(F, S)`.
            pictures (`dict`): By view `(F, H, W, 3)` uint8, upright; a few are drawn again and compared.
            depth_max_m (`float`): Farthest depth kept.

        Raises:
            ValueError: If the simulator shows something else.
        """
        labels = ExactLabels(self, tuple(pictures), depth_max_m)
        compared = {0, len(states) // 2, len(states) - 1}
        for frame, state in enumerate(states):
            self.show(state)
            labels.add_frame()
            for view, stored in pictures.items() if frame in compared else ():
                difference = np.abs(self.render_rgb(view).astype(int) - stored[frame]).mean()
                if difference > LARGEST_DIFFERENCE:
                    raise ValueError(
                        f"{self.where}: the simulator does not show frame {frame} of {view} as it is stored "
                        f"(mean difference {difference:.0f} of 255): its meshes or textures are others"
                    )
        return labels
