"""NIfTI, NRRD and MetaImage files as the libraries read them, and what these do not check.

Compressed streams are read to their checksum, a file holds exactly the voxels that its header states, a voxel size is
stated and not made up, and units other than millimetres are converted.
"""

import gzip
import io
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from utils.errors import InputError
from utils.files import is_utf8
from utils.machine import available_memory
from utils.nifti import affine_ras

METAIMAGE, NRRD = (".mha", ".mhd"), (".nrrd", ".nhdr")
GZIP = b"\x1f\x8b"
BLOCK = 1 << 20  # bytes that are unpacked at a time where none of them is kept
ANY_WRAPPER = 47  # of zlib.decompressobj: zlib's own or that of gzip
MM = {
    **dict.fromkeys(("", "?", "unknown", "mm", "millimeter", "millimeters", "millimetre", "millimetres"), 1.0),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1e3),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\xb5m", "\u03bcm", "micron", "microns", "micrometer", "micrometre"), 1e-3),
}  # of the units that headers name; a header without one means mm


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes an `InputError` that names it, and nothing is printed."""
    shown, log = sitk.ProcessObject.GetGlobalWarningDisplay(), nib.imageglobals.logger
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # what matters is raised below, in one sentence
    log.disabled = True
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if "Failed to allocate" in str(error):  # of ITK
            raise MemoryError(f"{path} is too large") from error
        if isinstance(error, OSError) and error.errno:  # of the system, not of a library
            raise InputError(f"{path} cannot be read: {error.strerror}; see its rights and its disk") from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = next((line for line in lines if "ERROR" in line), lines[-1])
        reason = re.sub(r"^.*ERROR: (\w+\(0x\w+\): )?", "", said)
        raise InputError(f"{path} is damaged or no scan ({reason}); export it again") from error
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)
        log.disabled = False


def in_mm(affine: np.ndarray, unit: float) -> np.ndarray:
    """An affine in millimetres, from one in units of `unit` mm."""
    return np.diag([unit, unit, unit, 1.0]) @ affine


def _unit(names: list[str], path: Path) -> float:
    """Millimetres of the one unit that a header names; an `InputError` where it is unknown or differs by axis."""
    sizes = {MM.get(name.lower()) for name in names if name} or {1.0}
    if len(sizes) > 1 or None in sizes:
        raise InputError(f"{path} states its geometry in {', '.join(dict.fromkeys(names))}; export it again in mm")
    return sizes.pop()


def itk_name(path: Path) -> str:
    """The name for ITK, whose bindings end the whole process at one that is not UTF-8: here that is an `InputError`."""
    name = str(path)
    if not is_utf8(name):
        raise InputError(f"{path} has a name in another encoding than UTF-8; rename it")
    return name


def _require_length(path: Path, held: int, stated: int) -> None:
    if held != stated:
        raise InputError(f"{path} is damaged: {held} bytes where its header states {stated}; export it again")


# --- NIfTI


class _Header(nib.Nifti1Header):
    quaternion_threshold = -1e-3  # ITK and FSL read quaternions that are slightly too long, too


class _Image(nib.Nifti1Image):
    header_class = _Header


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[np.ndarray, ...], nib.Nifti1Header]:
    """Array, RAS affine in mm (None where no voxel size is stated), its other readings, and the header.

    The content decides, not the suffix: compressed or not, NIfTI 1 or 2.
    """
    packed = path.read_bytes()
    zipped = packed.startswith(GZIP)
    stream = gzip.GzipFile(fileobj=io.BytesIO(packed)) if zipped else io.BytesIO(packed)
    head = stream.read(nib.Nifti2Header.sizeof_hdr)
    sizes = [int.from_bytes(head[:4], order) for order in ("little", "big")]
    kind = nib.Nifti2Image if nib.Nifti2Header.sizeof_hdr in sizes else _Image
    header = kind.header_class(head[: kind.header_class.sizeof_hdr], check=False)  # a check puts 1 for a size of 0
    if (start := header.get_data_offset()) < header.single_vox_offset:  # ITK and nibabel take different voxels
        raise InputError(f"{path} has its voxels at byte {start}, within its header; export it again")
    stop = start + math.prod(header.get_data_shape()) * header.get_data_dtype().itemsize
    if zipped and stop > available_memory():
        raise MemoryError(f"{stop / 2**30:.1f} GiB, as its header states")
    content = head + stream.read(max(stop - len(head), 0))
    beyond = itertools.chain([content[stop:]], iter(lambda: stream.read(BLOCK), b""))
    _require_length(path, len(content[:stop]) + sum(len(block.strip(b"\0")) for block in beyond), stop)
    stated = header["sform_code"] > 0 or bool((header["pixdim"][1:4] > 0).all())
    image = kind.from_bytes(content)
    unit = _nifti_unit(image.header, path)
    affine = in_mm(image.affine, unit) if stated else None
    readings = (*_qform(image.header, unit), *_itk_reading(path)) if np.isfinite(image.affine).all() else ()
    return np.asanyarray(image.dataobj), affine, readings, image.header


def _nifti_unit(header: nib.Nifti1Header, path: Path) -> float:
    try:
        return _unit([header.get_xyzt_units()[0]], path)
    except KeyError:
        return _unit([f"unit number {int(header['xyzt_units']) & 7}"], path)


def _qform(header: nib.Nifti1Header, unit: float) -> tuple[np.ndarray, ...]:
    """The affine of the qform, whatever its code; () where nobody can read it, beside a valid sform."""
    try:
        affine = header.get_qform()
    except (ValueError, nib.spatialimages.HeaderDataError):
        return ()
    return (in_mm(affine, unit),) if np.isfinite(affine).all() and np.linalg.det(affine) else ()


def _itk_reading(path: Path) -> tuple[np.ndarray, ...]:
    """The affine that ITK, and with it 3D Slicer and ITK-SNAP, reads from a NIfTI header; () where it reads none."""
    reader = sitk.ImageFileReader()
    try:
        reader.SetFileName(itk_name(path))
        reader.ReadImageInformation()
        parts = [np.array(part) for part in (reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())]
        size = reader.GetDimension()
        return (affine_ras(parts[0][:3], parts[1][:3], parts[2].reshape(size, size)[:3, :3]),)
    except (RuntimeError, ValueError, InputError):
        return ()


# --- NRRD and MetaImage


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Array and RAS affine in mm of a NRRD or MetaImage file; None where it states no voxel size."""
    header, rest = _text_header(path)
    unit = _itk_unit(header, path)
    files = _voxel_files(path, header, rest)
    if missing := next((file for file in files if not file.is_file()), None):
        raise InputError(f"{path} has its voxels in {missing}, which is missing; copy that file, too")
    reader = sitk.ImageFileReader()
    reader.SetFileName(itk_name(path))
    reader.SetImageIO("MetaImageIO" if path.suffix.lower() in METAIMAGE else "NrrdImageIO")  # ITK takes .MHA for none
    reader.ReadImageInformation()
    if "complex" in (kind := sitk.GetPixelIDValueAsString(reader.GetPixelID())):
        raise InputError(f"{path} holds values of type {kind}; give one real number per voxel")
    if (held := _length(path, header, rest, files)) is not None:
        components = reader.GetNumberOfComponents()
        size = sitk.Image([1, 1], reader.GetPixelID(), components).GetSizeOfPixelComponent()
        _require_length(path, held, math.prod(reader.GetSize()) * components * size)
    array, affine = _from_itk(reader.Execute())
    return array, in_mm(affine, unit) if _states_voxel_size(header) else None


def _text_header(path: Path) -> tuple[str, bytes]:
    """The fields of a NRRD or MetaImage file as text, and what follows them."""
    content = path.read_bytes()
    end = rb"ElementDataFile[^\n]*\n" if path.suffix.lower() in METAIMAGE else rb"\r?\n\r?\n"
    found = re.search(end, content)
    stop = found.end() if found else len(content)
    return content[:stop].decode("latin-1"), content[stop:]


def _itk_unit(header: str, path: Path) -> float:
    """ITK ignores it."""
    named = re.search(r"^(?:(?:space )?units:|DistanceUnits\s*=)\s*(.*?)\s*$", header, re.M)
    return _unit([word.strip('"') for word in named[1].split()] if named else [], path)


def _states_voxel_size(header: str) -> bool:
    """Whether three axes have one; ITK puts 1 for what is absent or no number."""
    stated = re.search(r"^(space directions:|spacings:|Element(?:Spacing|Size)\s*=)(.*)$", header, re.M | re.I)
    numbers = re.findall(r"[^\s(),]+", stated[2]) if stated else []
    usable = [word for word in numbers if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", word, re.I)]
    return len(usable) >= (9 if stated and "directions" in stated[1] else 3)


def files_of(path: Path) -> list[Path]:
    """Every file that a scan is read from: those of a folder, a header and its voxel files, or the file itself."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file())
    if path.suffix.lower() not in (*METAIMAGE, *NRRD):
        return [path]
    return [path, *(file for file in _voxel_files(path, *_text_header(path)) if file.is_file())]


def _voxel_files(path: Path, header: str, rest: bytes) -> list[Path]:
    """The files that a header names; none where the voxels follow it."""
    named = re.search(r"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", header, re.I | re.M)
    words = named[1].split() if named else ["LOCAL"]
    if words[0] == "LIST":
        below = header[named.end() :] + rest.decode("latin-1")
        names = [line.strip() for line in below.splitlines() if line.strip()]
    elif "%" in words[0] and len(words) >= 4:
        first, last, step = map(int, words[1:4])
        names = [words[0] % number for number in range(first, last + 1, step)]
    else:
        names = [named[1]] if named and words[0] != "LOCAL" else []
    return [path.parent / name for name in names]


def _length(path: Path, header: str, rest: bytes, files: list[Path]) -> int | None:
    """Bytes of voxels that are there, read to the checksum where they are compressed, which ITK does not do.

    None where it says little: for numbers as text, and after a part that is skipped.
    """
    zipped = re.search(r"^encoding:\s*gz", header, re.I | re.M)
    deflated = re.search(r"^CompressedData\s*=\s*True", header, re.I | re.M)
    if zipped or deflated:
        packed = [file.read_bytes() for file in files] or [rest]
        size = re.search(r"^CompressedDataSize\s*=\s*(\d+)\s*$", header, re.M)
        if deflated and (size or not files):  # without it ITK reads other bytes than these, but from a file of voxels
            _require_length(path, sum(map(len, packed)), int(size[1]) if size else 0)
        held = sum(map(_unpacked_length, packed))
    else:
        held = sum(file.stat().st_size for file in files) if files else len(rest)
    other = r"^((byte|line) ?skip|HeaderSize|encoding:(?!\s*(raw|gz))|BinaryData\s*=\s*False)"
    return None if re.search(other, header, re.I | re.M) else held


def _unpacked_length(packed: bytes) -> int:
    unpacker, held = zlib.decompressobj(ANY_WRAPPER), 0
    while block := unpacker.decompress(packed, BLOCK):
        held, packed = held + len(block), unpacker.unconsumed_tail
    if not unpacker.eof:
        raise EOFError("the compressed stream is cut")
    return held


def _from_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Array (W, H, D) or as many axes as there are, and affine; components of a colour image come last."""
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[..., 0]
    array = sitk.GetArrayViewFromImage(image)
    components = int(image.GetNumberOfComponentsPerPixel() > 1)
    axes = (*reversed(range(image.GetDimension())), *([image.GetDimension()] if components else []))
    array = np.array(array.transpose(axes))
    if image.GetDimension() != 3:
        return array, np.eye(4)
    return array, affine_ras(image.GetSpacing(), image.GetOrigin(), image.GetDirection())
