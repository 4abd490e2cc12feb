#include "model/preprocess.h"
