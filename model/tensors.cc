#include "model/tensors.h"
