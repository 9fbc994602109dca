"""What the vision adapters read from a description: transforms in words and the role of the picture."""

import pytest
import torch

from golden.adapters.vision_described import image, transformed


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (None, [0, 51, 255]),
        ("x = (input_u8.float() - 127.5) / 58.0", [-127.5 / 58, -76.5 / 58, 127.5 / 58]),
        ("x = (pixels.float() - 120) / 60", [-2.0, -1.15, 2.25]),
        ("x = input_u8.float() / 255", [0.0, 0.2, 1.0]),
    ],
)
def test_a_transform_is_read_from_its_words(transform, expected):
    found = transformed(torch.tensor([0, 51, 255], dtype=torch.uint8), transform)
    torch.testing.assert_close(found.float(), torch.tensor(expected, dtype=torch.float32))


def test_a_transform_of_another_form_is_not_guessed():
    with pytest.raises(ValueError, match="x = sqrt"):
        transformed(torch.zeros(1), "x = sqrt(input)")


@pytest.mark.parametrize("role", ["image_u8", "image", "image_f32"])
def test_the_picture_is_found_under_any_role_of_an_image(role):
    picture = torch.zeros(1, 3, 4, 4)
    assert image({"tokens": torch.ones(1), role: picture}) is picture
