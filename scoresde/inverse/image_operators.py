r"""Linear measurements of images: filters, downsampling, channels and Fourier coefficients.

Images are (B, H, W) or (B, C, H, W); filters and Fourier coefficients act on each channel, with periodic boundaries. A
filter is then diagonal in the discrete Fourier transform F: A = F^* diag(K) F. For real images, the eigenvectors of
A^T A are those of the Hartley transform, V^T x = Re F x - Im F x, which is orthogonal and its own inverse.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.arguments import Count, Positive, check_memory, checked
from scoresde.inverse.operators import Operator, check_trailing, checked_mask, singular_axes
from scoresde.tensors import at_least_float32, float64, floating

# 2011.13456, appendix I.2: the orthogonal colour space of the published code (controllable_generation.py of
# score_sde), here in closed form. Its axes are the columns: grey, and two of colour.
COLOUR_AXES = torch.tensor(
    [
        [3**-0.5, -2 * 6**-0.5, 0.0],
        [3**-0.5, 6**-0.5, 2**-0.5],
        [3**-0.5, 6**-0.5, -(2**-0.5)],
    ],
    dtype=torch.float64,
)
FILTERS = ("box", "bicubic")


@checked
class Downsampling(Operator):
    """A periodic convolution that keeps every `factor`-th pixel: (B, C, H, W) -> (B, C, H/factor, W/factor).

    The pixel i of the result has its centre at the centre of the pixels factor i, ..., factor i + factor - 1.

    The singular values of a box are known. For every filter, A A^T is a periodic convolution of the small image, whose
    eigenvalues are the mean of |K|^2 over the frequencies that downsampling makes equal; this gives the pseudo-inverse.

    Args:
        factor: the factor by which height and width shrink.
        filter: "box", the mean of factor x factor pixels; "bicubic", Keys' cubic convolution with a = -1/2, stretched
            by the factor against aliasing; or the filter itself (h, w).
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        ValueError: factor < 1, the filter is unknown, or not a matrix of finite numbers; in a call, the height or the
            width of the images is not a multiple of the factor.
    """

    def __init__(self, factor: Count, filter: str | Tensor = "box", noise_std: float | Tensor = 0.0):
        super().__init__(noise_std)
        self.factor = factor
        if isinstance(filter, str):
            if filter not in FILTERS:
                raise ValueError(f"filter must be one of {', '.join(FILTERS)}, or a matrix (h, w); got {filter!r}")
            taps = torch.ones(factor, dtype=torch.float64) / factor if filter == "box" else _bicubic(factor)
            self.kernel = torch.outer(taps, taps)
            self.has_spectrum = filter == "box"
        else:
            self.kernel = _checked_kernel("filter", filter)

    def __call__(self, x: Tensor) -> Tensor:
        x = floating(x)
        size = self._size(x)
        return _convolve(x, self._response(size))[..., :: self.factor, :: self.factor]

    def adjoint(self, y: Tensor) -> Tensor:
        y, k = floating(y), self.factor
        _check_images("measurements", y)
        size = y.shape[-2] * k, y.shape[-1] * k
        spread = y[..., :, None, :, None] * _corner(k).to(y)[:, None, :]
        return _convolve(spread.reshape(*y.shape[:-2], *size), self._response(size).conj())

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        k, y = self.factor, floating(y)
        _check_images("measurements", y)
        size = y.shape[-2] * k, y.shape[-1] * k
        power = self._response(size).abs().square().unflatten(-1, (k, -1)).unflatten(-3, (k, -1)).mean(dim=(-4, -2))
        inverse = torch.where(power > power.max() * power.numel() * torch.finfo(power.dtype).eps, 1 / power, 0.0)
        return self.adjoint(_convolve(y, inverse))

    def to_spectrum(self, x: Tensor) -> Tensor:
        return self._per_block(x, self._cosines())

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return self._per_block(coordinates, self._cosines().mT)

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        """Return 1/factor for the mean of each block, and 0 for the other cosines."""
        if not self.has_spectrum:
            raise self._no_spectrum()
        height, width = (size // self.factor for size in tuple(shape)[-2:])
        return (_corner(self.factor) / self.factor).repeat(height, width).expand(tuple(shape))

    def _cosines(self) -> Tensor:
        """Return the orthonormal cosine transform of one block (factor, factor); its first row is constant."""
        if not self.has_spectrum:
            raise self._no_spectrum()
        k = torch.arange(self.factor, dtype=torch.float64)
        rows = torch.cos(math.pi / self.factor * k[:, None] * (k + 0.5)) * (2 / self.factor) ** 0.5
        rows[0] *= 0.5**0.5
        return rows

    def _per_block(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the images with `rows` applied to the rows and the columns of each block of factor x factor pixels."""
        self._size(x)
        k, rows = self.factor, rows.to(x)
        blocks = x.unflatten(-1, (-1, k)).unflatten(-3, (-1, k))
        return torch.einsum("ip,jq,...hpwq->...hiwj", rows, rows, blocks).reshape(x.shape)

    def _size(self, x: Tensor) -> tuple[int, int]:
        """Return the height and the width of images; raise ValueError unless they are multiples of the factor."""
        _check_images("states", x)
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"height and width must be multiples of {self.factor}; got {tuple(x.shape)}: choose another factor, or "
                "crop them"
            )
        return x.shape[-2], x.shape[-1]

    def _response(self, size: tuple[int, int]) -> Tensor:
        """Return the eigenvalues K of the convolution, complex (H, W).

        Tap j of n has the offset j - (n + factor - 2)//2.
        """
        offsets = [torch.arange(n) - (n + self.factor - 2) // 2 for n in self.kernel.shape]
        places = (offsets[0] % size[0])[:, None] * size[1] + offsets[1] % size[1]
        impulse = torch.zeros(math.prod(size), dtype=torch.float64)
        impulse.index_add_(0, places.flatten(), self.kernel.flatten().cpu())
        return torch.fft.fft2(impulse.reshape(size))


class Blur(Downsampling):
    """A convolution with a kernel and periodic boundaries, y = k * x; y has the shape of the images.

    Args:
        kernel: (h, w), usually of odd sizes; the centre of n taps is tap (n - 1)//2.
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        ValueError: the kernel is not a matrix of finite numbers.
    """

    def __init__(self, kernel: Tensor, noise_std: float | Tensor = 0.0):
        super().__init__(1, _checked_kernel("kernel", kernel), noise_std)
        self.has_spectrum = True

    def to_spectrum(self, x: Tensor) -> Tensor:
        return _hartley(x)

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return _hartley(coordinates)

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        """Return |K| at each frequency; values below the rounding error of float64 are 0."""
        values = self._response((shape[-2], shape[-1])).abs()
        values = torch.where(values > values.max() * values.numel() * torch.finfo(values.dtype).eps, values, 0.0)
        return values.expand(tuple(shape))


@checked
class GaussianBlur(Blur):
    """A blur with a Gaussian kernel, of sum 1 and cut off at 4 standard deviations.

    Args:
        std: standard deviation of the kernel, in pixels.
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        ValueError: std is not positive, or the kernel needs more memory than there is.
    """

    def __init__(self, std: Positive = 1.0, noise_std: float | Tensor = 0.0):
        radius = math.ceil(4 * std)
        check_memory("the kernel", 8 * (2 * radius + 1) ** 2)
        taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / std).square())
        taps = taps / taps.sum()
        super().__init__(torch.outer(taps, taps), noise_std)


class ChannelMixing(Operator):
    """A matrix M applied to the channels of each pixel, y = M x: (B, C, *) -> (B, m, *).

    Args:
        matrix: M, (m, C).
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        ValueError: the matrix is not (m, C), of finite numbers; in a call, the states do not have C channels.
    """

    has_spectrum = True

    def __init__(self, matrix: Tensor, noise_std: float | Tensor = 0.0):
        super().__init__(noise_std)
        self.matrix = _checked_kernel("the matrix of channels", matrix)
        self._values, self._axes = singular_axes(self.matrix)

    def __call__(self, x: Tensor) -> Tensor:
        return _mix("states", floating(x), self.matrix)

    def adjoint(self, y: Tensor) -> Tensor:
        return _mix("measurements", floating(y), self.matrix.mT)

    def to_spectrum(self, x: Tensor) -> Tensor:
        return _mix("states", x, self._axes)

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return _mix("coordinates", coordinates, self._axes.mT)

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        return self._values.reshape(-1, *(1,) * (len(shape) - 1)).expand(tuple(shape))


class Grey(ChannelMixing):
    """A weighted sum of the channels: (B, C, *) -> (B, 1, *).

    Args:
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.
        weights: one for each channel; default: the mean of three channels.

    Raises:
        ValueError: weights are not finite numbers (C,), or all are 0.
    """

    def __init__(self, noise_std: float | Tensor = 0.0, weights: Sequence[float] | Tensor = (1 / 3, 1 / 3, 1 / 3)):
        row = float64(weights)
        if row.ndim != 1:
            raise ValueError(f"weights must have one number for each channel; got shape {tuple(row.shape)}")
        if not bool(row.any()):
            raise ValueError(f"weights must not all be 0, which measures nothing; got {row.tolist()}")
        super().__init__(row[None], noise_std)


class Colour(ChannelMixing):
    """The orthogonal colour space of 2011.13456: (B, 3, *) -> (B, 3, *).

    Channel 0 is grey, the sum of the channels over 3^(1/2). Channels 1 and 2 are colour: (-2 R + G + B)/6^(1/2) and
    (G - B)/2^(1/2). The published colourisation measures channel 0: `Inpainting` of this channel, composed with
    `Colour()`.
    """

    is_orthogonal = True

    def __init__(self, noise_std: float | Tensor = 0.0):
        super().__init__(COLOUR_AXES.mT, noise_std)


class Fourier(Operator):
    """The Fourier coefficients of images where the mask is true, as in magnetic resonance imaging.

    The transform is orthonormal. A measurement of images (B, C, H, W) is (B, C, 2, m), or (B, 2, m) of (B, H, W): the
    real and the imaginary parts of the m coefficients. The coefficients of real images at k and -k are conjugates: a
    singular value is 1 if both are measured, and 2^(-1/2) if one of them is.

    Args:
        mask: (H, W), bools or numbers 0 and 1, with frequency 0 at [0, 0] (torch.fft.ifftshift moves it there).
        noise_std: standard deviation of a measurement's noise, a number or one for each of its entries; 0 for none.

    Raises:
        TypeError: mask is not a tensor or an array of bools or real numbers.
        ValueError: mask is not (H, W), an entry is neither 0 nor 1, or all are 0.
    """

    has_spectrum = True

    def __init__(self, mask: Tensor, noise_std: float | Tensor = 0.0):
        super().__init__(noise_std)
        self.mask = checked_mask(mask)
        if self.mask.ndim != 2:
            raise ValueError(f"mask must be (H, W); got {tuple(self.mask.shape)}")
        self._kept = self.mask.flatten().nonzero().flatten()

    def __call__(self, x: Tensor) -> Tensor:
        x = floating(x)
        check_trailing("states", x, self.mask.shape)
        coefficients = torch.fft.fft2(at_least_float32(x), norm="ortho").flatten(-2)
        kept = coefficients.index_select(-1, self._kept.to(x.device))
        return torch.stack((kept.real, kept.imag), dim=-2).to(x.dtype)

    def adjoint(self, y: Tensor) -> Tensor:
        y = floating(y)
        check_trailing("measurements", y, (2, len(self._kept)))
        parts = at_least_float32(y)
        empty = parts.new_zeros(*y.shape[:-1], self.mask.numel())
        real, imaginary = empty.index_add(-1, self._kept.to(y.device), parts).unbind(-2)
        coefficients = torch.complex(real, imaginary).unflatten(-1, self.mask.shape)
        return torch.fft.ifft2(coefficients, norm="ortho").real.to(y.dtype)

    def to_spectrum(self, x: Tensor) -> Tensor:
        return _hartley(x)

    def from_spectrum(self, coordinates: Tensor) -> Tensor:
        return _hartley(coordinates)

    def singular_values(self, shape: Sequence[int]) -> Tensor:
        mask = self.mask.double()
        opposite = mask.flip(0, 1).roll((1, 1), (0, 1))  # of the frequency -k, modulo the size
        return ((mask + opposite) / 2).sqrt().expand(tuple(shape))


def _bicubic(factor: int) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2 (1981, eq. 15), stretched by `factor`, its taps normalised to sum 1."""
    n = 4 * factor - factor % 2
    d = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2).abs() / factor
    near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
    taps = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    return taps / taps.sum()


def _convolve(x: Tensor, response: Tensor) -> Tensor:
    """Return the images (..., H, W), convolved with the kernel whose eigenvalues are `response` (H, W)."""
    spectrum = torch.fft.fft2(at_least_float32(x))
    return torch.fft.ifft2(spectrum * response.to(spectrum)).real.to(x.dtype)


def _hartley(x: Tensor) -> Tensor:
    """Return the orthonormal Hartley transform of images (..., H, W), its own inverse."""
    spectrum = torch.fft.fft2(at_least_float32(x), norm="ortho")
    return (spectrum.real - spectrum.imag).to(x.dtype)


def _corner(size: int) -> Tensor:
    """Return zeros (size, size) with 1 at [0, 0]."""
    corner = torch.zeros(size, size, dtype=torch.float64)
    corner[0, 0] = 1
    return corner


def _mix(name: str, x: Tensor, matrix: Tensor) -> Tensor:
    """Return x (B, C, *) with the matrix (m, C) applied to its channels; raise ValueError if C differs."""
    count = matrix.shape[1]
    if x.ndim not in (2, 3, 4) or x.shape[1] != count:
        raise ValueError(f"{name} must be (B, {count}), (B, {count}, L) or (B, {count}, H, W); got {tuple(x.shape)}")
    return torch.einsum("mc,bc...->bm...", matrix.to(x), x)


def _check_images(name: str, x: Tensor) -> None:
    if x.ndim not in (3, 4):
        raise ValueError(f"{name} must be images (B, H, W) or (B, C, H, W); got {tuple(x.shape)}")


def _checked_kernel(name: str, values: Tensor) -> Tensor:
    """Return a matrix (h, w) as float64; raise ValueError if it has another shape or numbers that are not finite."""
    kernel = float64(values)
    if kernel.ndim != 2 or not kernel.numel() or not bool(torch.isfinite(kernel).all()):
        raise ValueError(f"{name} must be a matrix of finite numbers; got shape {tuple(kernel.shape)}")
    return kernel
