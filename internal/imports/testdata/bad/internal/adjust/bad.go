// SPDX-License-Identifier: Apache-2.0

// A fixture that breaks the import rules.
package bad

import _ "io/fs"
import _ "os/exec"
import _ "github.com/syslatch/syslatch/profiles"
