// SPDX-License-Identifier: Apache-2.0

// A fixture that breaks the import rules.
package bad

import _ "C"
import _ "github.com/seccomp/libseccomp-golang"
