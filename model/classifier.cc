#include "model/classifier.h"
