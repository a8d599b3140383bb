"""Every parameter of a run: its unit, its default, what it may be, and what it changes."""

from assay.parameters.dictionaries import DictionaryParameters
from assay.parameters.digits import DigitsParameters
from assay.parameters.extract import (
    ExtractParameters,
    FolderParameters,
    ImagesToRecord,
    LabeledImagesToRecord,
    LabelsParameters,
    RecordingParameters,
)
from assay.parameters.faults import parse_parameters, text_or_null
from assay.parameters.fields import (
    NUMBER,
    DictionaryName,
    added_defaults,
    changing_no_result,
    result_values,
)
from assay.parameters.images import ImagesParameters
from assay.parameters.stages import (
    KMeansParameters,
    PCAParameters,
    ProbeParameters,
    ShardsParameters,
    SparsityParameters,
    StandardizeParameters,
)
from assay.parameters.whole import Parameters

__all__ = [
    "NUMBER",
    "DictionaryName",
    "DictionaryParameters",
    "DigitsParameters",
    "ExtractParameters",
    "FolderParameters",
    "ImagesParameters",
    "ImagesToRecord",
    "KMeansParameters",
    "LabeledImagesToRecord",
    "LabelsParameters",
    "PCAParameters",
    "Parameters",
    "ProbeParameters",
    "RecordingParameters",
    "ShardsParameters",
    "SparsityParameters",
    "StandardizeParameters",
    "added_defaults",
    "changing_no_result",
    "parse_parameters",
    "result_values",
    "text_or_null",
]
