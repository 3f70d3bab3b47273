"""Makes the Auto classes of transformers know GLSCL. Importing any class of the package does it too."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoProcessor,
)

from model.configuration import GLSCLConfig
from model.glscl import GLSCLModel
from model.pretraining import GLSCLForPreTraining
from model.processing import GLSCLImageProcessor, GLSCLProcessor
from model.question_answering import GLSCLForVisualQuestionAnswering

# exist_ok: a reload of the module is no clash of names.
AutoConfig.register("glscl", GLSCLConfig, exist_ok=True)
AutoModel.register(GLSCLConfig, GLSCLModel, exist_ok=True)
AutoModelForPreTraining.register(GLSCLConfig, GLSCLForPreTraining, exist_ok=True)
AutoModelForVisualQuestionAnswering.register(GLSCLConfig, GLSCLForVisualQuestionAnswering, exist_ok=True)
# One class under both of transformers' backends, or it would report a fallback.
AutoImageProcessor.register(
    GLSCLConfig,
    image_processor_classes={"torchvision": GLSCLImageProcessor, "pil": GLSCLImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(GLSCLConfig, GLSCLProcessor, exist_ok=True)
