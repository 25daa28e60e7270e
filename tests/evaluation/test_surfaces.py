import numpy as np
import pytest

from evaluation.surfaces import mesh, sample, signed_surface_distance


def ball(radius: float, centre=(12, 14, 16), shape=(30, 32, 34)) -> np.ndarray:
    grid = np.indices(shape) - np.reshape(centre, (3, 1, 1, 1))
    return np.sqrt((grid**2).sum(axis=0)) <= radius


def test_mesh_of_a_ball_lies_on_it_and_looks_outwards():
    surface = mesh(ball(9), 10_000)
    spokes = surface.vertices - (12, 14, 16)
    assert np.linalg.norm(spokes, axis=1) == pytest.approx(9, abs=0.7)
    assert (np.einsum("ij,ij->i", spokes, surface.normals) > 0).all()


def test_mesh_is_coarsened_until_it_is_small_enough():
    assert len(mesh(ball(9), 800).faces) <= 800 < len(mesh(ball(9), 10_000).faces)


def test_single_voxel_keeps_a_surface():
    assert len(mesh(ball(0.5), 100).faces) > 0


def test_signed_distance_to_the_faces_of_voxels():
    distance = signed_surface_distance(ball(0.5))
    assert distance[12, 14, 16] == -0.5
    assert distance[14, 14, 16] == 1.5


def test_sampling_is_linear_and_continues_outside():
    volume = np.arange(5.0)[:, None, None] * np.ones((1, 3, 3))
    assert sample(volume, np.array([[1.5, 1, 1], [-3.0, 0, 0]])).tolist() == [1.5, 0.0]
