"""A latent recurrent pathway for pretrained decoders of transformers: `lrt.retrofit`.

Neutral when it is added: the model computes what it did, bit for bit. Trained, each token reads the high-layer hidden
state of the token before it. Importing this registers retrofitted models with transformers' Auto classes.
"""

from transformers import AutoConfig

from lrt.integrations.retrofit.configuration import MODEL_TYPE, WHEN_READ, RetrofitConfig
from lrt.integrations.retrofit.convert import retrofit
from lrt.integrations.retrofit.folder import retrofit_folder
from lrt.integrations.retrofit.modeling import RetrofitForCausalLM, model_class
from lrt.integrations.retrofit.pathway_config import PathwayConfig

AutoConfig.register(MODEL_TYPE, RetrofitConfig)
WHEN_READ.append(model_class)  # registers it: a folder then needs no code of its own
__all__ = ["PathwayConfig", "RetrofitConfig", "RetrofitForCausalLM", "retrofit", "retrofit_folder"]
