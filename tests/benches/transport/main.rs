//! `make bench-transport`: Dhow's way into the guest beside the others, on one VM in one run.
//!
//! Each row is the median of five samples with the least and the most; the ways take turns, so that what
//! else the machine does meets all of them. DHOW_BENCH narrows the rows to those whose names hold it.

#![allow(missing_docs)]

mod bare;
mod bulk;
mod docker;
mod echo;
mod goals;
mod iperf;
mod processes;
mod ways;

use bulk::Direction;
use dhow_tests::report;
use dhow_tests::table::{Row, Samples, Table};
use ways::{LIMIT, WAYS, Ways};

const SAMPLES: usize = 5;
/// A guest that floods the device with what it has to refuse; at the lowest priority, since its own processors are
/// not what is measured.
const BESIDE_KNOCKS: &str = "echo beside a flood of refused requests, round trips/s";
const SIZES: [(&str, usize); 3] = [("4 KiB", 4 << 10), ("64 KiB", 64 << 10), ("1 MiB", 1 << 20)];
const DIRECTIONS: [(&str, Direction); 2] =
    [("host → guest", Direction::ToGuest), ("guest → host", Direction::ToHost)];

fn main() {
    // Cargo says "--bench" to every bench; there is nothing else to say.
    report::bench(measure);
}

fn measure() {
    let ways = Ways::set_up();
    let mut table = Table::new(&WAYS);
    let chosen = std::env::var("DHOW_BENCH").unwrap_or_default();
    let mut bench = Bench { ways: &ways, table: &mut table, chosen: &chosen };
    bench.processes();
    bench.echoes();
    bench.bulk();
    bench.forwards();
    bench.docker();
    let version = ways::qemu_version(&ways.vm);
    ways.stop();
    println!("QEMU {version}, emulated; medians of {SAMPLES} (least–most)\n\n{table}");
    if chosen.is_empty() {
        println!("{}", goals::check(&table));
    }
}

struct Bench<'a> {
    ways: &'a Ways,
    table: &'a mut Table,
    chosen: &'a str,
}

impl Bench<'_> {
    /// Rows of one kind of sample: a name each for what a sample has.
    fn rows<const N: usize>(
        &mut self,
        names: [String; N],
        mut sample: impl FnMut(usize) -> Option<[f64; N]>,
    ) {
        if !names.iter().any(|name| name.contains(self.chosen)) {
            return;
        }
        let mut rows = names.map(|name| Row { name, cells: vec![Samples::default(); WAYS.len()] });
        for _ in 0..SAMPLES {
            for way in 0..WAYS.len() {
                let Some(values) = sample(way) else { continue };
                for (row, value) in rows.iter_mut().zip(values) {
                    row.cells[way].add(value);
                }
            }
        }
        rows.into_iter().for_each(|row| self.table.add(row));
    }

    fn echoes(&mut self) {
        let ways = self.ways;
        for connections in [1, 100] {
            let names = ["round trips/s", "p50 ms", "p99 ms"]
                .map(|what| format!("echo of 64 B, {connections} connections, {what}"));
            self.rows(names, |way| {
                let echo = echo::sample(ways.servers[way], connections);
                Some([echo.rate, echo.p50, echo.p99])
            });
        }
        let names = ["p50 ms", "p99 ms"].map(|what| format!("echo beside 8 bulk streams, {what}"));
        self.rows(names, |way| {
            let _bulk = bulk::Background::start(ways.servers[way], 8);
            let echo = echo::sample(ways.servers[way], 1);
            Some([echo.p50, echo.p99])
        });
        self.rows([BESIDE_KNOCKS.to_owned()], |way| {
            let _knocks = ways.knock();
            Some([echo::sample(ways.servers[way], 1).rate])
        });
    }

    fn bulk(&mut self) {
        let ways = self.ways;
        for (towards, direction) in DIRECTIONS {
            for streams in [1, 8] {
                for (size, write) in SIZES {
                    let name = format!("{towards}, {streams} streams, writes of {size}, MB/s");
                    self.rows([name], |way| {
                        Some([bulk::sample(ways.servers[way], direction, streams, write)])
                    });
                }
            }
        }
    }

    fn forwards(&mut self) {
        let ways = self.ways;
        for (towards, direction) in DIRECTIONS {
            self.rows([format!("iperf3 {towards}, Mbit/s")], |way| {
                Some([iperf::sample(ways.iperf[way]?, direction)])
            });
        }
    }

    fn docker(&mut self) {
        let ways = self.ways;
        let pings = ["docker /_ping, kept connection, ms", "docker /_ping, new connection, ms"];
        self.rows(pings.map(str::to_owned), |way| {
            let socket = ways.docker[way].as_deref();
            (socket.is_some() || WAYS[way] == LIMIT).then(|| docker::pings(&ways.vm, socket))
        });
        let name = "docker load of 200 MB, s";
        if name.contains(self.chosen) {
            let archive = docker::Archive::make(&ways.vm);
            self.rows([name.to_owned()], |way| Some([archive.load(&ways.vm, ways.docker[way].as_ref()?)]));
        }
    }

    /// Before all else: memory is to be that of a VM that was not used yet.
    fn processes(&mut self) {
        let vm = &self.ways.vm;
        let only_dhow = |value: f64| {
            let mut cells = vec![Samples::default(); WAYS.len()];
            cells[0].add(value);
            cells
        };
        for (name, mebibytes) in processes::memory(vm) {
            self.table.add(Row { name: format!("RssAnon of {name}, MiB"), cells: only_dhow(mebibytes) });
        }
        for (name, cost) in processes::idle(vm) {
            self.table.add(Row { name: format!("idle {name}, % of a core"), cells: only_dhow(cost.percent) });
            self.table.add(Row { name: format!("idle {name}, wakeups/s"), cells: only_dhow(cost.wakeups) });
        }
    }
}
