// SPDX-License-Identifier: Apache-2.0

// A fixture that breaks the import rules.
package bad

import _ "os"
import _ "log/slog"
import _ "github.com/sirupsen/logrus"
import _ "encoding/json"
import _ "github.com/opencontainers/runtime-spec/specs-go"
