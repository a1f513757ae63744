//! HPL (Petitet et al. 2004) inside Debian's hpcc: its input written, its output read. Text only.

use serde::{Deserialize, Serialize};

/// Tests in hpcc, each behind a switch of its own: words side by side in a structure, HPL's first (hpcc.h, `HPCC_Params`).
const TESTS: u32 = 16;

/// hpcc with all its tests but HPL switched off.
///
/// Its source has a switch for each test (`if (params.RunHPL) …`) but nothing sets them to anything but 1. In the program
/// such a switch is a comparison of a word on the stack with zero and a jump to the test if it differs; here the fifteen
/// jumps become no operation, as if those words were 0. `None` if the program does not look as expected (it does in Debian
/// 12, hpcc 1.5.0-3, amd64).
pub fn only_hpl(program: &[u8]) -> Option<Vec<u8>> {
    // cmp dword [rsp + word], 0; jne test
    let switch = |at: usize| match program.get(at..at + 10)? {
        [0x83, 0xbc, 0x24, a, b, c, d, 0, 0x0f, 0x85] => Some((at, u32::from_le_bytes([*a, *b, *c, *d]))),
        _ => None,
    };
    let found: Vec<(usize, u32)> = (0..program.len()).filter_map(switch).collect();
    let (hpl, switches) = found.iter().find_map(|(_, first)| {
        let near = found.iter().filter(|(_, word)| word.checked_sub(*first).is_some_and(|distance| distance < TESTS * 4));
        let mut words: Vec<u32> = near.clone().map(|(_, word)| *word).collect();
        words.sort_unstable();
        (words.into_iter().eq((0..TESTS).map(|index| first + index * 4))).then(|| (*first, near.copied().collect::<Vec<_>>()))
    })?;
    // HPL is run last.
    if switches.last()?.1 != hpl {
        return None;
    }
    let mut changed = program.to_vec();
    for (at, _) in switches.into_iter().filter(|(_, word)| *word != hpl) {
        let jump = changed.get_mut(at + 8..at + 14)?;
        jump.copy_from_slice(&[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00]);
    }
    Some(changed)
}

/// What HPL is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Problem {
    /// Order of the matrix.
    pub n: u32,
    /// Rows of the process grid.
    pub p: u32,
    /// Columns of the process grid.
    pub q: u32,
    /// Block size.
    pub nb: u32,
}

impl Problem {
    /// The text of hpccinf.txt: HPL's 31 lines, a separator, and no further sizes for PTRANS.
    pub fn input(&self) -> String {
        let Self { n, p, q, nb } = self;
        format!(
            "HPLinpack benchmark input file
violin
HPL.out      output file name (if any)
8            device out (6=stdout,7=stderr,file)
1            # of problems sizes (N)
{n}         Ns
1            # of NBs
{nb}           NBs
0            PMAP process mapping (0=Row-,1=Column-major)
1            # of process grids (P x Q)
{p}            Ps
{q}            Qs
16.0         threshold
1            # of panel fact
2            PFACTs (0=left, 1=Crout, 2=Right)
1            # of recursive stopping criterium
4            NBMINs (>= 1)
1            # of panels in recursion
2            NDIVs
1            # of recursive panel fact.
1            RFACTs (0=left, 1=Crout, 2=Right)
1            # of broadcast
1            BCASTs (0=1rg,1=1rM,2=2rg,3=2rM,4=Lng,5=LnM)
1            # of lookahead depth
1            DEPTHs (>=0)
2            SWAP (0=bin-exch,1=long,2=mix)
64           swapping threshold
0            L1 in (0=transposed,1=no-transposed) form
0            U  in (0=transposed,1=no-transposed) form
1            Equilibration (0=no,1=yes)
8            memory alignment in double (> 0)
##### this line is ignored #####
0            number of additional problem sizes for PTRANS
0            values of N
0            number of additional blocking sizes for PTRANS
0            values of NB
"
        )
    }
}

/// What HPL found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HplResult {
    /// Whether the residual check passed.
    pub passed: bool,
    /// Billions of floating-point operations per second.
    pub gflops: f64,
    /// Seconds by HPL's own clock.
    pub seconds: f64,
    /// Order of the matrix.
    pub n: u32,
    /// Block size.
    pub nb: u32,
    /// Rows of the process grid.
    pub p: u32,
    /// Columns of the process grid.
    pub q: u32,
    /// Scaled residual; below 16 passes.
    pub residual: f64,
}

/// Reads the last result in the text of hpccoutf.txt or HPL.out.
///
/// Errors: no result or no residual after it; what to look at.
pub fn read_result(text: &str) -> Result<HplResult, String> {
    let lines: Vec<&str> = text.lines().collect();
    let at = lines.iter().rposition(|line| figures(line).is_some());
    let Some((at, (n, nb, p, q, seconds, gflops))) = at.and_then(|at| Some((at, figures(lines[at])?))) else {
        return Err("no result line (WR…  N  NB  P  Q  Time  Gflops): HPL did not come to its end; see the output above".into());
    };
    let check = lines[at..].iter().find(|line| line.starts_with("||Ax-b||"));
    let check = check.and_then(|line| {
        let (residual, verdict) = line.rsplit_once('=')?.1.trim().split_once(' ')?;
        Some((residual.parse().ok()?, verdict.trim_end().ends_with("PASSED")))
    });
    let Some((residual, passed)) = check else {
        return Err("no residual line (||Ax-b||… PASSED or FAILED) after the result: HPL was cut short".into());
    };
    Ok(HplResult { passed, gflops, seconds, n, nb, p, q, residual })
}

/// A result line's figures.
fn figures(line: &str) -> Option<(u32, u32, u32, u32, f64, f64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [variant, n, nb, p, q, seconds, gflops] = words[..] else { return None };
    if !(variant.starts_with("WR") || variant.starts_with("WC")) || variant.len() != 8 {
        return None;
    }
    let finite = |text: &str| text.parse().ok().filter(|value: &f64| value.is_finite());
    Some((n.parse().ok()?, nb.parse().ok()?, p.parse().ok()?, q.parse().ok()?, finite(seconds)?, finite(gflops)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
WALL    50    50  40  40   2   2     0.00 PASSED    0.295  0.00
T/V                N    NB     P     Q               Time                 Gflops
--------------------------------------------------------------------------------
WR11C2R4        2000    40     2     2               0.43              1.253e+01
--------------------------------------------------------------------------------
||Ax-b||_oo/(eps*(||A||_oo*||x||_oo+||b||_oo)*N)=        0.0070257 ...... PASSED
";

    #[test]
    fn a_result_is_read() {
        let wanted = HplResult { passed: true, gflops: 12.53, seconds: 0.43, n: 2000, nb: 40, p: 2, q: 2, residual: 0.007_025_7 };
        assert_eq!(read_result(OUTPUT), Ok(wanted));
    }

    #[test]
    fn the_last_result_counts() {
        let later = OUTPUT.replace("2000 ", "3000 ").replace("0.0070257 ...... PASSED", "99.5 ...... FAILED");
        let result = read_result(&format!("{OUTPUT}{later}")).unwrap();
        assert_eq!((result.n, result.passed, result.residual), (3000, false, 99.5));
    }

    #[test]
    fn output_cut_short_is_an_error() {
        for end in ["WALL", "WR11", "||Ax"] {
            let cut = &OUTPUT[..OUTPUT.find(end).unwrap()];
            assert!(read_result(cut).is_err(), "before {end}");
        }
        assert!(read_result("WR11C2R4 2000 40 2 2 nan nan\n").is_err());
    }

    fn program(words: &[u32]) -> Vec<u8> {
        let one = |word: &u32| [&[0x90, 0x83, 0xbc, 0x24], &word.to_le_bytes()[..], &[0, 0x0f, 0x85, 1, 2, 3, 4]].concat();
        words.iter().flat_map(one).collect()
    }

    /// Switches in the order of the tests, after another comparison that is none.
    fn words() -> Vec<u32> {
        [0xc0].into_iter().chain((1..16).map(|index| 0xac8 + index * 4)).chain([0xac8]).collect()
    }

    #[test]
    fn all_tests_but_hpl_are_switched_off() {
        let before = program(&words());
        let after = only_hpl(&before).unwrap();
        for (index, (old, new)) in before.chunks(15).zip(after.chunks(15)).enumerate() {
            if index == 0 || index == 16 {
                assert_eq!(old, new, "switch {index}");
            } else {
                assert_eq!((&new[..9], &new[9..]), (&old[..9], &b"\x66\x0f\x1f\x44\0\0"[..]), "switch {index}");
            }
        }
    }

    #[test]
    fn a_program_that_looks_otherwise_is_refused() {
        let mut first = words();
        first.rotate_right(1);
        let mut twice = words();
        twice.push(0xad0);
        for other in [&words()[..16], &words()[2..], &first, &twice, &[]] {
            assert_eq!(only_hpl(&program(other)), None, "{other:x?}");
        }
    }

    #[test]
    fn the_hpcc_of_this_machine_looks_as_expected() {
        // Only where the package is installed.
        if let Ok(hpcc) = std::fs::read("/usr/bin/hpcc") {
            assert!(only_hpl(&hpcc).is_some());
        }
    }

    #[test]
    fn the_input_says_the_problem_on_the_lines_hpl_reads() {
        let input = Problem { n: 2000, p: 2, q: 3, nb: 64 }.input();
        let lines: Vec<&str> = input.lines().collect();
        let first = |line: usize| lines[line - 1].split_whitespace().next().unwrap();
        assert_eq!((first(6), first(8), first(11), first(12)), ("2000", "64", "2", "3"));
        assert_eq!(lines.len(), 36);
    }
}
