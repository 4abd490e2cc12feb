#include "model/pvt_v2.h"
