//! A throttling store: most of its cap is used, little is refused, nothing
//! fails. Every figure is a share of what the store lets through in the same
//! run.

#[path = "support/load.rs"]
mod load;
#[path = "support/node.rs"]
mod node;

use std::time::{Duration, Instant};

use dysk::emulator::{Effect, Operation, Rule, SettingsChange};
use dysk::volume::AccountPace;
use load::{Load, ROUNDS, SIZE, change, measure, open, slow_store};

#[test]
fn most_of_a_cap_is_used_and_little_refused_and_without_limits_far_more() {
    const MIB: u64 = 1 << 20;
    println!(
        "{:<28} {:>10} {:>10} {:>14}",
        "", "used", "refused", "switched off"
    );
    let standard = SettingsChange {
        iops: Some(500),
        bandwidth: Some(60 * MIB),
        ..SettingsChange::default()
    };
    for (name, bytes, cap) in [
        ("standard, 4 KiB", 4096, 500.0),
        ("standard, 512 KiB", MIB / 2, 120.0),
    ] {
        let (used, refused) = measure(&standard, cap, bytes, &AccountPace::default());
        let (_, without) = measure(&standard, cap, bytes, &AccountPace::off());
        println!(
            "{name:<28} {:>8.1} % {:>8.2} % {:>12.1} %",
            100.0 * used,
            100.0 * refused,
            100.0 * without
        );
        assert!(used >= 0.9, "{name}: {used}");
        assert!(refused <= 0.02, "{name}: {refused}");
        assert!(
            without >= 4.0 * refused && without > 0.05,
            "{name}: {without}"
        );
    }
}

#[test]
fn an_accounts_cap_is_shared_fairly() {
    let store = slow_store();
    store.create("greedy.vhd", SIZE);
    store.create("modest.vhd", SIZE);
    change(
        &store,
        &SettingsChange {
            account_iops: Some(600),
            ..SettingsChange::default()
        },
    );
    let pace = AccountPace::default();
    store.block_on(async {
        let greedy = Load::start(open(&store, "greedy.vhd", &pace).await, 160, 4096);
        let modest = Load::start(open(&store, "modest.vhd", &pace).await, 32, 4096);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let time = Duration::from_millis(1500);
        let (mut fairest, mut refused) = (0.0, 0.0);
        for _ in 0..ROUNDS {
            let (a, b) = tokio::join!(greedy.run(time), modest.run(time));
            println!("greedy {a:?}, modest {b:?}");
            let share = b.rate() / (a.rate() + b.rate());
            if f64::abs(share - 0.5) < f64::abs(fairest - 0.5) {
                fairest = share;
            }
            refused += (a.refused() + b.refused()) / (2 * ROUNDS) as f64;
        }
        assert!((0.45..=0.55).contains(&fairest), "{fairest}");
        assert!(refused < 0.03, "{refused}");
        let status = modest.volume.status();
        let throttled = status.throttled.expect("it shows");
        assert!(throttled.account, "{throttled}");
        tokio::join!(greedy.stop(), modest.stop());
    });
}

#[test]
fn a_store_that_times_out_is_asked_less_at_a_time_and_nothing_fails() {
    let store = slow_store();
    store.create("a.vhd", SIZE);
    store.block_on(async {
        let volume = open(&store, "a.vhd", &AccountPace::default()).await;
        let load = Load::start(volume, 64, 4096);
        load.run(Duration::from_millis(500)).await;
        assert_eq!(load.volume.status().throttled, None);
        let timed_out = Effect::status(500, "OperationTimedOut");
        store
            .running
            .faults()
            .set(vec![Rule::on(Operation::PutPage, timed_out).times(40)]);
        let began = Instant::now();
        let throttled = loop {
            load.run(Duration::from_millis(20)).await;
            if let Some(throttled) = load.volume.status().throttled {
                break throttled;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "never throttled");
        };
        assert!(
            throttled.under_way.is_some_and(|most| most < 64),
            "{throttled}"
        );
        // And comes back by itself once the store is well.
        loop {
            load.run(Duration::from_millis(100)).await;
            let most = load
                .volume
                .status()
                .throttled
                .map_or(Some(64), |t| t.under_way);
            if most.is_some_and(|most| most >= 32) {
                break;
            }
            assert!(
                began.elapsed() < Duration::from_secs(60),
                "still slow: {most:?}"
            );
        }
        load.stop().await;
    });
}
