"""A reconstruction in the browser, live: viser draws the cloud, the cameras and what moves, with a slider for time."""

from __future__ import annotations

import time
from importlib.util import find_spec
from typing import Any

import numpy as np

from vggrpo.errors import UserError
from vggrpo.evaluation.reconstruct import Reconstruction


def require_viser() -> None:
    """Fail before the work, not after it."""
    if find_spec("viser") is None:
        raise UserError("--view needs viser; install it with: pip install 'vggrpo[view]' (or open index.html instead)")


def start_server(found: Reconstruction, port: int = 8080, *, host: str = "127.0.0.1") -> Any:
    """A viser server that shows the scene; it stops with `.stop()`.

    Args:
        port: of this machine; the next free one where it is taken.
        host: only this machine can look, unless another address is given.
    """
    import viser
    import viser.transforms

    server = viser.ViserServer(host=host, port=port, verbose=False)
    server.scene.set_up_direction("-y")
    cloud, p = found.cloud, found.prediction
    extent = float(np.median(np.linalg.norm(cloud.points - np.median(cloud.points, axis=0), axis=1)))
    size = 0.012 * extent
    still = ~cloud.moving
    server.scene.add_point_cloud("/still", cloud.points[still], cloud.colours[still], point_size=size)
    cameras: list[Any] = []
    moving: dict[int, Any] = {}
    height, width = p.size
    for view, image in enumerate(found.clip.frames):
        own = cloud.moving & (cloud.view == view)
        if own.any():  # the browser's side refuses an empty cloud
            name = f"/moving/{view}"
            moving[view] = server.scene.add_point_cloud(name, cloud.points[own], cloud.colours[own], point_size=size)
        pose = p.cam2world[0, view].double().numpy()
        fov = float(2 * np.arctan(height / 2 / p.intrinsics[0, view, 1, 1]))  # vertical
        turn = viser.transforms.SO3.from_matrix(pose[:3, :3]).wxyz
        name, shape = f"/cameras/{view}", {"fov": fov, "aspect": width / height, "scale": 0.08 * extent}
        cameras.append(server.scene.add_camera_frustum(name, image=image, wxyz=turn, position=pose[:3, 3], **shape))
    slider = server.gui.add_slider("view", 0, len(cameras) - 1, 1, 0)

    def show(_: Any = None) -> None:
        for view, points in moving.items():
            points.visible = view == slider.value
        for view, camera in enumerate(cameras):
            camera.color = (230, 120, 20) if view == slider.value else (120, 120, 120)

    @server.on_client_connect
    def _(client: Any) -> None:
        # From behind and above the first camera, which sits at the origin and looks along z.
        client.camera.position = (0.5 * extent, -1.0 * extent, -2.0 * extent)
        client.camera.look_at = tuple(np.median(cloud.points, axis=0).tolist())

    slider.on_update(show)
    show()
    return server


def serve(found: Reconstruction, port: int) -> None:
    """Show the scene until Ctrl-C."""
    server = start_server(found, port)
    print(f"4D scene at http://127.0.0.1:{server.get_port()} (Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        server.stop()
