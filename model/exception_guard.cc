#include "model/exception_guard.h"
