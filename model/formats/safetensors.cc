#include "model/formats/safetensors.h"
